"""The inspector's page: an `Inspection` as one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from pema.adapter.schedule import (
    Constant,
    Fitted,
    GradualUnrolling,
    Linear,
    NoAdapter,
    Schedule,
)
from pema.adapter.store import digest_of
from pema.errors import ConfigError
from pema.files import writing
from pema.pages.inspector.inspection import Inspection, inspect_generation
from pema.pages.page import html_page, static
from pema.signature import signature

if TYPE_CHECKING:
    from pema.adapter.module import Adapter
    from pema.owner.contract import PLM
    from pema.tasks.registry import Task

SCRIPTS = ("mixture.js", "shown.js", "chart.js", "detail.js", "inspector.js")

Formula = GradualUnrolling | Linear | Constant | Fitted | NoAdapter
"""The schedules that the page can compute by itself."""


def write_inspection(
    path: Path,
    plm: PLM,
    adapter: Adapter,
    source: str,
    task: Task,
    schedule: Schedule,
    *,
    reference: str | None = None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] | None = None,
) -> Inspection:
    """Inspect the generation from `source` and write its page to `path`, whole or not at all.

    The page offers the adapter's fitted schedule, if it has one. For the arguments and what
    is raised, see `inspect_generation` and `inspector_page`; StorageError where the disk refuses.
    """
    formula = _formula(schedule)
    ending = {
        "max_new_tokens": max_new_tokens or adapter.config.max_new_tokens,
        "stop": list(adapter.config.stop if stop is None else stop),
    }
    inspection = inspect_generation(plm, adapter, source, task, schedule, max_new_tokens=max_new_tokens, stop=stop)
    config = {
        "adapter": {"name": adapter.name, "sha256": digest_of(adapter.state_dict())},
        "plm": plm.description.to_dict(),
        "task": task.name,
        "template": task.template.text,
        "source": source,
        "schedule": formula.to_dict(),
        **ending,
    }
    page = inspector_page(
        inspection,
        schedule,
        signature=signature(config, None),
        fitted=adapter.config.fitted,
        reference=reference,
    )
    with writing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return inspection


def inspector_page(
    inspection: Inspection,
    schedule: Schedule,
    *,
    signature: Mapping[str, Any],
    fitted: Fitted | None = None,
    reference: str | None = None,
) -> str:
    """Make the page: the same arguments give the same bytes.

    Args:
        inspection: what `inspect_generation` found.
        schedule: the one that it was made with.
        signature: of the run.
        fitted: the adapter's fitted schedule, so that it can be chosen; needless where it is `schedule`.
        reference: a text to show beside the generated one.

    Raises:
        ConfigError: a schedule that the page has no formula for.
    """
    formula = _formula(schedule)
    if isinstance(formula, Fitted):
        fitted = formula
    texts = {"Source": inspection.source, "Generated": inspection.output}
    if reference is not None:
        texts["Reference"] = reference
    shown = [f'<dt>{name}</dt><dd dir="auto">{escape(text)}</dd>' for name, text in texts.items()]
    shown.append(f"<dt>Made with</dt><dd>{escape(inspection.plm)} and its adapter, {_named(formula)}</dd>")
    steps = inspection.steps
    body = Template(static("inspector/body.html")).substitute(
        texts="\n".join(shown),
        prompt=escape(inspection.prompt),
        signature=escape(json.dumps(signature, indent=2, ensure_ascii=False)),
        stored=round(sum(len(step.candidates) for step in steps) / len(steps)),
    )
    return html_page(
        "PEMA token by token",
        body,
        css=[static("inspector/inspector.css")],
        js=[static(f"inspector/{name}") for name in SCRIPTS],
        data=inspection.to_json()
        | {"schedule": formula.to_dict(), "fitted": None if fitted is None else fitted.to_dict()},
        description="Which distribution chose each token, the adapter’s or the PLM’s, and what another weight of the "
        "adapter would have changed.",
    )


def _named(schedule: Formula) -> str:
    """A schedule in words, as HTML."""
    match schedule:
        case GradualUnrolling(lambda_max):
            return f"Gradual Unrolling with λ<sub>max</sub> = {lambda_max:g}"
        case Linear(lambda_max):
            return f"linear schedule with λ<sub>max</sub> = {lambda_max:g}"
        case Constant(value):
            return f"constant weight {value:g}"
        case Fitted():
            return "fitted schedule"
        case NoAdapter():
            return "no weight for the adapter"


def _formula(schedule: Schedule) -> Formula:
    """Refuse a schedule of the user's own.

    Raises:
        ConfigError: it is one.
    """
    if not isinstance(schedule, Formula):
        raise ConfigError(
            f"The page has no formula for the schedule {type(schedule).__name__}: inspect with one of pema's own."
        )
    return schedule
