"""The settings of every stage, as `src/pema` declares them: the tables of docs/settings.md."""

from __future__ import annotations

import dataclasses
import math

from pema.adapter.presets import PRESETS
from pema.cli.build import BUILDING, LOADING
from pema.cli.generate import GENERATING
from pema.cli.settings import Options
from pema.cli.train import TRAINING
from pema.schema import fields_of
from reproduction.tables.markdown import head, row

STAGES: dict[str, tuple[str, Options]] = {
    "Loading a PLM": (
        "`pema.open_plm(name, ...)`; `pema build`, `generate`, `inspect`, `release`, `serve`",
        LOADING,
    ),
    "Building a memory": ("`pema.build_memory(...)`; `pema build`", BUILDING),
    "Training an adapter": ("`pema.TrainConfig(...)`, `pema.preset(name, ...)`; `pema train`", TRAINING),
    "Generating": ("`pema.generate(...)`; `pema generate`", GENERATING),
}


def settings() -> str:
    """All stages."""
    return "\n".join(f"## {title}\n\n{where}\n\n{_table(options)}" for title, (where, options) in STAGES.items())


def _table(options: Options) -> str:
    presets = PRESETS if options is TRAINING else {}
    text = head(["setting", "on the command line", "values", "default", *map(_code, presets), "meaning"])
    for field in fields_of(options.kind):
        common = field.name in options.common
        form = field.form() if field.form() != "TEXT" else "text"
        limits = field.range(math.inf)
        text += row(
            [
                _code(field.name),
                _code(options.flag(field.name) if common else f"--set {field.name}=..."),
                (form.replace("|", ", ") if "|" in form else form.lower()) + (f", {limits}" if limits else ""),
                _value(field.default),
                *(_changed(getattr(config, field.name), field.default) for config in presets.values()),
                field.help.replace("|", "\\|"),
            ]
        )
    return text


def _changed(value: object, default: object) -> str:
    return "" if value == default else _value(value)


def _value(value: object) -> str:
    if value is None or value is dataclasses.MISSING:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    return f"`{text}`"
