"""Options that several verbs share, with their help texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.settings import Options, with_line_breaks
from pema.cluster.config import EngineConfig
from pema.console import printable, stdout
from pema.errors import ConfigError
from pema.extras import require_library
from pema.owner.config import LoadConfig
from pema.owner.openai_api.config import APIConfig, is_described
from pema.owner.sources.names import CAUSAL, require_model
from pema.owner.sources.served import is_served, served
from pema.schema import SEED, Field, require
from pema.storage.address import require_local

PLM = "A packaged PLM (smollm2-135m; 'embedded', for tests), a hub name, a transformers folder, a GGUF file"
PLMName = Annotated[
    str,
    typer.Option(
        "--plm",
        help=f"{PLM}, or llamacpp:FILE, which llama.cpp runs; or the address of its owner's server (https://..., "
        "llamacpp+http://host:port#FILE, vllm+..., sglang+... or logprobs+http://host:port#FOLDER; with the API key in "
        "PEMA_API_KEY); or a .toml file that describes an API.",
    ),
]
LocalPLMName = Annotated[str, typer.Argument(help=f"{PLM}.", metavar="PLM")]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        help="translation, style, summarisation, qa, reply (a message as it is), data-to-text or classification; or "
        "module:attribute of your own.",
    ),
]
OwnTaskName = Annotated[str | None, typer.Option("--task", help="The adapter's task; default: what it records.")]
TemplateText = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Prompt with {source} in it, instead of the task's own; \\n stands for a line break.",
        parser=with_line_breaks,
        metavar="TEXT",
    ),
]
ChatPrompts = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts in the PLM's chat template, or plain; default: in the chat template if the PLM has one.",
        show_default=False,
    ),
]
OwnChatPrompts = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts in the PLM's chat template, or plain; default: as the adapter was trained.",
        show_default=False,
    ),
]
SystemPrompt = Annotated[
    str | None, typer.Option("--system", help="System prompt of the chat; default: the chat template's own.")
]
OwnSystemPrompt = Annotated[str | None, typer.Option("--system", help="System prompt; default: the adapter's.")]


def local_path(place: Path | None) -> Path | None:
    """Check what a command writes to this machine only; for `typer.Option(callback=local_path)`.

    Raises:
        ConfigError: it is an address.
    """
    if place is not None:
        require_local(place)
    return place


InputLines = Annotated[Path | None, typer.Option("--input", help="Source texts, one per line.")]
InputData = Annotated[
    str | None,
    typer.Option("--data", help="Sources, as `pema build` reads examples: JSONL, CSV, ...; no target is needed."),
]
InputColumn = Annotated[
    str | None, typer.Option("--source-field", help="Column of --data with the source, if not `source`.")
]


SourceLines = Annotated[Path | None, typer.Option("--source", help="Source texts, one per line.")]
TargetLines = Annotated[Path | None, typer.Option("--target", help="Target texts, one per line.")]
PairsData = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="JSONL, JSON, CSV, TSV or Parquet file (.gz too), folder of a data set, or hf:NAME:SPLIT; "
        "instead of --source and --target.",
    ),
]
SourceColumn = Annotated[
    str | None, typer.Option("--source-field", help="Column of --data with the source; default: recognised.")
]
TargetColumn = Annotated[
    str | None, typer.Option("--target-field", help="Column of --data with the target; default: recognised.")
]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="paper|best|residual|private",
        help="paper: the paper's hyper-parameters; best: ours; residual: ours without copying from the prompt; "
        "private: ours under DP-SGD, which best means with --dp-epsilon (docs/presets.md).",
    ),
]


def integer(flag: str, help: str, **limits: int) -> Any:  # noqa: ANN401
    """Declare an option with a whole number in the limits of `pema.schema.option`, which its help shows."""
    field = Field(flag, int, {"help": help, **limits}, MISSING)
    return typer.Option(flag, help=field.meaning(), callback=lambda value: require(flag, value, int, **limits))


Seed = Annotated[int, integer("--seed", "Seed of everything random.", least=0, most=SEED)]


def loading(*names: str) -> Options:
    """Return the options for loading a PLM."""
    return Options(LoadConfig, names, flags={"dtype": "--plm-dtype"})


FURTHER = ("dtype", "device_map", "revision", "mask_secret")
"""Settings for loading a PLM whose tap is that of an adapter."""

RUNNING = Options(EngineConfig, ("engine", "workers", "address"))
"""Where the work is done."""

AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AdapterPlace = Annotated[str, typer.Argument(help="Folder, address or hub name of the adapter.", metavar="ADAPTER")]
MemoryPlace = Annotated[str, typer.Argument(help="Folder or address of the external memory.", metavar="MEMORY")]


def require_plm(name: str, revision: str | None = None) -> None:
    """Refuse the name of a PLM that leads nowhere, before torch is imported.

    Raises:
        OwnerError: a folder does not exist or contains no model, or the hub has no such model.
    """
    if is_described(name):
        name = APIConfig.read(Path(name)).proxy
    if is_served(name):
        served(name)
        return
    is_gguf = Path(name).suffix.lower() == ".gguf" and Path(name).is_file()  # is converted when it is opened
    if not is_gguf and not name.startswith(("http://", "https://")):
        require_model(name, CAUSAL, revision)


def require_generating(engine: EngineConfig, plm: str) -> None:
    """Refuse replicas that could not generate, before torch is imported.

    Raises:
        ConfigError: Ray is not installed, or the PLM is described as an API.
    """
    if engine.engine != "ray":
        return
    require_library("--engine ray", "ray", "ray")
    if is_described(plm):
        raise ConfigError(
            f"{plm} describes an API: one process sends its requests side by side and keeps its budget. Omit --engine."
        )


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a flat result: aligned lines for a person, one JSON object for a program."""
    if as_json:
        stdout.print(printable(json.dumps(result, ensure_ascii=False, indent=2)), markup=False)
        return
    width = max(map(len, result), default=0)
    for name, value in result.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        stdout.print(printable(f"{name.replace('_', ' '):<{width}}  {text}"), markup=False)
