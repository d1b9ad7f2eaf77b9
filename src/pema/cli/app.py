"""The `pema` application with its verbs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pema import __version__
from pema.cli import (
    adapt,
    audit,
    build,
    classify,
    compare,
    demo,
    demonstrate,
    evaluate,
    generate,
    inspect,
    memory,
    recover,
    release,
    report,
    serve,
    sweep,
    train,
    tune,
)
from pema.console import stderr, stdout
from pema.processes import require_single

app = typer.Typer(
    name="pema",
    help="Adapt a frozen language model without its weights (Plug-in External Memory Adaptation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"pema {__version__}")
        raise typer.Exit


PARALLEL = ("build", "train")
"""The commands that a launcher may start in several processes."""


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of a failure (anywhere in the command).")
    ] = False,
) -> None:
    """Adapt a frozen language model without its weights (Plug-in External Memory Adaptation)."""
    if context.invoked_subcommand not in PARALLEL:
        require_single(f"pema {context.invoked_subcommand}")
    if not stderr.is_terminal:
        # Bars that other libraries draw while they load weights or download files are noise in a log.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


app.command("demo")(demo.demo)
app.command("demonstrate")(demonstrate.demonstrate)
app.command("build")(build.build)
app.add_typer(memory.app, name="memory")
app.command("train")(train.train)
app.command("adapt")(adapt.adapt)
app.command("audit")(audit.audit)
app.command("tune")(tune.tune)
app.command("generate")(generate.generate)
app.command("classify")(classify.classify)
app.command("inspect")(inspect.inspect)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.command("recover")(recover.recover)
app.command("release")(release.release)
app.command("serve")(serve.serve)
app.command("serve-key")(serve.serve_key)
