"""Step 4: the mixture of the PLM and the adapter, token by token, through the model's own `generate`."""

from __future__ import annotations

from pema.generation.decoding import generate
from pema.generation.fitted import fit_schedule
from pema.generation.mixture import mix
from pema.generation.plugin import Attached, attach
from pema.generation.schedule import (
    SCHEDULES,
    Constant,
    Fitted,
    GradualUnrolling,
    Linear,
    NoAdapter,
    Schedule,
    choose_schedule,
    get_schedule,
    load_schedule,
    save_schedule,
    schedule_from_dict,
)

__all__ = [
    "SCHEDULES",
    "Attached",
    "Constant",
    "Fitted",
    "GradualUnrolling",
    "Linear",
    "NoAdapter",
    "Schedule",
    "attach",
    "choose_schedule",
    "fit_schedule",
    "generate",
    "get_schedule",
    "load_schedule",
    "mix",
    "save_schedule",
    "schedule_from_dict",
]
