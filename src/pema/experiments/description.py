# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""The keys of the file that describes a comparison or a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pema.evaluation.choice import TEXTS
from pema.generation.config import GenerateConfig
from pema.memory.config import BuildConfig
from pema.methods.contract import Budget
from pema.owner.config import LoadConfig, PLMDtype
from pema.schema import SEED, documented, option, same


@documented
@dataclass(frozen=True)
class TextFiles:
    """A part of the data as text files: the keyword arguments of `read_examples`."""

    called: ClassVar[str] = "a part of the data"

    source: str | None = option(None, "Source texts, one per line.")
    target: str | None = option(None, "Target texts, one per line.")
    data: str | None = option(
        None, "JSONL, JSON, CSV, TSV or Parquet file (.gz too), folder of a data set, or hf:NAME:SPLIT."
    )
    source_field: str | None = option(None, "Column of `data` with the source; default: detected.")
    target_field: str | None = option(None, "Column of `data` with the target; default: detected.")
    limit: int | None = option(None, "Use only this number of examples, from the first on.", least=1)
    formal: str | None = option(None, "Formal references with CoCoA-MT formality marks.")
    informal: str | None = option(None, "Informal references with CoCoA-MT formality marks.")


@documented
@dataclass(frozen=True)
class GyafcFiles:
    """A part of the data from GYAFC: the keyword arguments of `read_gyafc`."""

    called: ClassVar[str] = "a part of the data from GYAFC"

    gyafc: str = option(help="GYAFC's folder.")
    part: str = option(help="train, tune or test.")
    domain: str | None = option(None, "Folder of the domain.")
    reference: int = option(0, "Number of the reference, from 0.", least=0, most=9)
    limit: int | None = option(None, "Use only this number of examples, from the first on.", least=1)


@documented
@dataclass(frozen=True)
class DataTable:
    """The data."""

    called: ClassVar[str] = "[data]"

    name: str = option(
        help="Name of the data in results; `restaurants` and `support`, without parts, are bundled with the package."
    )
    train: Mapping[str, Any] | None = option(None, "Training examples.")
    dev: Mapping[str, Any] | None = option(None, "Examples for the choice of settings.")
    test: Mapping[str, Any] | None = option(None, "Examples for the reported scores.")
    labels: tuple[str, ...] | None = option(
        None, "Labels that `label_accuracy` chooses from; by default the different targets of train."
    )


@documented
@dataclass(frozen=True)
class MethodTable:
    """A method: one line of the table, or in a sweep one line per point of the grid."""

    called: ClassVar[str] = "[[methods]]"

    label: str = option(help="Name in the table.")
    method: str = option(help="Name of the method.")
    settings: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "Settings of all its runs."})
    grid: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings with candidates; compare chooses on dev, sweep reports all."},
    )
    choose: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings with candidates; a sweep chooses one at every point."}
    )
    seeds: int | None = option(None, "Run only with this number of the seeds, from the first on.", least=1)


@documented
@dataclass(frozen=True)
class ExperimentFile:
    """A comparison or a sweep."""

    called: ClassVar[str] = "the file"

    data: DataTable = option(help="The data.")
    name: str | None = option(None, "Folder of the results; by default the file's name.")
    title: str | None = option(None, "Title in the report; by default the name.")
    task: str = option("translation", "Name of the task.")
    template: str | None = option(None, "Prompt with {source} in it, instead of the task's own.")
    chat: bool | None = option(None, "Chat or plain prompts; by default a chat if the PLM has a chat template.")
    system: str | None = option(None, "System prompt of the chat; by default the chat template's own.")
    plm: str = option("embedded", "The PLM: every name that `--plm` takes (docs/owners.md).")
    plm_dtype: PLMDtype | None = same(LoadConfig, "dtype")
    device: str = option("auto", "Device of PLM and training: cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
    batch_tokens: int | None = same(BuildConfig, "batch_tokens")
    batch_size: int = same(GenerateConfig, "batch_size")
    seeds: tuple[int, ...] = option((0,), "Random seeds; every reported setting runs with each.", least=0, most=SEED)
    metrics: tuple[str, ...] | None = option(None, "Names of metrics, the main one first; by default the task's own.")
    choose_by: str | None = option(
        None,
        "Metric of the texts generated for dev that chooses among candidates, or `perplexity` of the dev targets; by "
        "default the first metric.",
    )
    choose_texts: int = option(
        TEXTS, "Maximum number of dev examples for which a candidate generates a text, evenly spaced.", least=1
    )
    reference: str | Sequence[str] = option((), "Label or labels of the lines that all others are compared with.")
    budget: Budget = option(Budget(), "Limits of training.")
    decoding: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Settings of generation, common to all methods, as for `pema generate` (max_new_tokens, stop, "
            "num_beams, ...); by default token limit and stop strings come from the training targets."
        },
    )
    methods: tuple[MethodTable, ...] = option((), "The methods, in the table's order.")
