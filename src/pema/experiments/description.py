# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""The keys of the file that a comparison or a sweep is described in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    source_field: str | None = option(None, "Column of `data` with the source; default: recognised.")
    target_field: str | None = option(None, "Column of `data` with the target; default: recognised.")
    limit: int | None = option(None, "Use only the first so many examples.", least=1)
    formal: str | None = option(None, "Formal references with CoCoA-MT formality marks.")
    informal: str | None = option(None, "Informal references with CoCoA-MT formality marks.")


@documented
@dataclass(frozen=True)
class GyafcFiles:
    """A part of the data from GYAFC: the keyword arguments of `read_gyafc`."""

    called: ClassVar[str] = "a part of the data from GYAFC"

    gyafc: str = option(help="GYAFC's folder.")
    part: str = option(help="train, tune or test.")
    domain: str | None = option(None, "The domain's folder.")
    reference: int = option(0, "Which of the references.", least=0, most=9)
    limit: int | None = option(None, "Use only the first so many examples.", least=1)


@documented
@dataclass(frozen=True)
class DataTable:
    """The data."""

    called: ClassVar[str] = "[data]"

    name: str = option(
        help="Name of the data in results; `restaurants` and `support`, without parts, are bundled with the package."
    )
    train: Mapping[str, Any] | None = option(None, "What is learned from.")
    dev: Mapping[str, Any] | None = option(None, "What settings are chosen on.")
    test: Mapping[str, Any] | None = option(None, "What is reported.")


@documented
@dataclass(frozen=True)
class MethodTable:
    """A method, a line of the table; a sweep has a line at every point of the grid."""

    called: ClassVar[str] = "[[methods]]"

    label: str = option(help="What the table calls it.")
    method: str = option(help="The method's name.")
    settings: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "Settings of all its runs."})
    grid: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings with candidates; compare chooses on dev, sweep shows all."},
    )
    choose: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings with candidates that a sweep chooses among at every point."}
    )


@documented
@dataclass(frozen=True)
class ExperimentFile:
    """A comparison or a sweep."""

    called: ClassVar[str] = "the file"

    data: DataTable = option(help="The data.")
    name: str | None = option(None, "Folder of the results; by default the file's name.")
    title: str | None = option(None, "What the report calls it; by default the name.")
    task: str = option("translation", "Name of the task.")
    template: str | None = option(None, "Prompt with {source} in it, instead of the task's own.")
    chat: bool | None = option(None, "Chat or plain prompts; by default a chat if the PLM has a chat template.")
    system: str | None = option(None, "System prompt of the chat; by default the chat template's own.")
    plm: str = option("embedded", "The PLM: a packaged one, a hub name, a folder, or a GGUF file.")
    plm_dtype: PLMDtype | None = same(LoadConfig, "dtype")
    device: str = option("auto", "Device of PLM and training: cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
    batch_tokens: int = same(BuildConfig, "batch_tokens")
    batch_size: int = same(GenerateConfig, "batch_size")
    seeds: tuple[int, ...] = option((0,), "Every setting that is reported runs once with each.", least=0, most=SEED)
    metrics: tuple[str, ...] | None = option(None, "Names; the first one leads. By default the task's own.")
    reference: str | Sequence[str] = option((), "Label, or labels, of the lines that all others are compared with.")
    budget: Budget = option(Budget(), "What training may use.")
    decoding: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Settings of generation, common to all methods, as for `pema generate` (max_new_tokens, stop, "
            "num_beams, ...); by default token limit and stop strings come from the training targets."
        },
    )
    methods: tuple[MethodTable, ...] = option((), "The methods, in the table's order.")
