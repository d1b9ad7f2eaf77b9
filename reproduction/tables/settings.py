"""The tables of docs/settings.md: the settings of every stage, as declared in `src/pema`."""

from __future__ import annotations

import dataclasses
import math

from pema.adapter.presets import PRESETS
from pema.cli.build import BUILDING, LOADING
from pema.cli.generate import GENERATING
from pema.cli.options import RUNNING
from pema.cli.recover import RECOVERING
from pema.cli.settings import Options
from pema.cli.train import TRAINING
from pema.experiments.description import DataTable, ExperimentFile, GyafcFiles, MethodTable, TextFiles
from pema.methods.contract import Budget
from pema.schema import Field, fields_of
from reproduction.tables.markdown import head, row

STAGES: dict[str, tuple[str, Options]] = {
    "Loading a PLM": (
        "`pema.open_plm(name, ...)`; `pema build`, `generate`, `inspect`, `release`, `serve`",
        LOADING,
    ),
    "Recovering an LM head": ("`pema.recover_head(url, tokenizer, output, ...)`; `pema recover`", RECOVERING),
    "Building a memory": ("`pema.build_memory(...)`; `pema build`", BUILDING),
    "Running on a cluster": (
        "`pema.replicas(name, workers=..., address=...)`, `pema.train_on_ray(..., workers=..., address=...)`; "
        "`pema build`, `train`, `generate`, `classify`",
        RUNNING,
    ),
    "Training an adapter": ("`pema.TrainConfig(...)`, `pema.preset(name, ...)`; `pema train`", TRAINING),
    "Generating": ("`pema.generate(...)`; `pema generate`", GENERATING),
}


FILE = {
    "The file": ExperimentFile,
    "`[data]`": DataTable,
    "A part of the data, text files": TextFiles,
    "A part of the data, GYAFC": GyafcFiles,
    "`[budget]`": Budget,
    "`[[methods]]`": MethodTable,
}
"""The tables of the file of `pema compare` and `pema sweep`."""


def settings() -> str:
    """Return the settings of all stages, then those of the file of comparisons and sweeps."""
    text = "".join(f"## {title}\n\n{where}\n\n{_table(options)}\n" for title, (where, options) in STAGES.items())
    text += "## Comparing\n\nThe keys of the file of `pema compare` and `pema sweep` ([experiments](experiments.md)).\n"
    for title, kind in FILE.items():
        text += f"\n### {title}\n\n" + head(["key", "values", "default", "meaning"])
        for each in fields_of(kind):
            text += row([_code(each.name), _values(each), _value(each.default), each.help])
    return text


def _table(options: Options) -> str:
    presets = PRESETS if options is TRAINING else {}
    text = head(["setting", "on the command line", "values", "default", *map(_code, presets), "meaning"])
    for field in fields_of(options.kind):
        common = field.name in options.common
        text += row(
            [
                _code(field.name),
                _code(options.flag(field.name) if common else f"--set {field.name}=..."),
                _values(field),
                _value(field.default),
                *(_changed(getattr(config, field.name), field.default) for config in presets.values()),
                field.help.replace("|", "\\|"),
            ]
        )
    return text


def _values(field: Field) -> str:
    form, limits = field.form(), field.range(math.inf)
    return (form.replace("|", ", ") if "|" in form else form.lower()) + (f", {limits}" if limits else "")


def _changed(value: object, default: object) -> str:
    return "" if value == default else _value(value)


def _value(value: object) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if value is None or dataclasses.is_dataclass(value) or value in ((), {}):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    return f"`{text}`"
