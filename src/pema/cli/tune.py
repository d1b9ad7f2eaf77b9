"""`pema tune`: the schedule of an adapter, chosen by what it generates for dev examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import FURTHER, AsJSON, PLMName, integer, loading, require_plm, show
from pema.cli.settings import Options, declared
from pema.errors import AdapterError
from pema.evaluation.choice import TEXTS
from pema.generation.config import GenerateConfig
from pema.storage.address import is_address, shown

GENERATING = Options(GenerateConfig, ("batch_size",))


@declared(settings=GENERATING, loaded=loading(*FURTHER))
def tune(
    adapter: Annotated[str, typer.Argument(help="Folder or address of the adapter.", metavar="ADAPTER")],
    plm: PLMName,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Dev examples with targets, as `pema build` reads examples: JSONL, CSV, ...; neither those of the "
            "training nor those of a test.",
        ),
    ],
    settings: dict[str, Any],
    loaded: dict[str, Any],
    source_field: Annotated[
        str | None, typer.Option("--source-field", help="Column of --data with the source; default: recognised.")
    ] = None,
    target_field: Annotated[
        str | None, typer.Option("--target-field", help="Column of --data with the target; default: recognised.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="The metric that decides; default: the task's first one.")
    ] = None,
    texts: Annotated[
        int, integer("--texts", "Maximum number of examples that texts are generated for.", least=1)
    ] = TEXTS,
    as_json: AsJSON = False,
) -> None:
    """Choose the adapter's schedule by the texts that it generates, and store it in the adapter. Nothing is trained.

    A constant weight, linear and Gradual Unrolling are compared; the adapter stays as it is until all are measured.

    Example: pema tune adapter --plm embedded --data dev.tsv
    """
    from pema.adapter.store import read_config
    from pema.adapter.task import task_of
    from pema.console import note
    from pema.evaluation.notation import metric_name, score_text
    from pema.tasks.readers import read

    if not is_address(adapter) and not Path(adapter).is_dir():
        raise AdapterError(f"{adapter} is not a folder, which the schedule is stored in: download the adapter first.")
    config = read_config(adapter)
    task = task_of(config)
    reading = read(data, source_field=source_field, target_field=target_field)
    note(str(reading))
    require_plm(plm, loaded.get("revision"))
    loaded["tap"] = config.tap

    from pema.adapter.module import Adapter
    from pema.evaluation.tuning import tune as tuned
    from pema.owner.opening import open_plm

    used = Adapter.from_pretrained(adapter)
    tuning = tuned(open_plm(plm, **loaded), used, reading.examples, metric=metric, texts=texts, task=task, **settings)
    used.save_pretrained(adapter)
    if not tuning.helps:
        note(f"no schedule scores better than the PLM alone ({score_text(tuning.metric, tuning.plm_alone)}).")
    if as_json:
        show({"adapter": shown(adapter), **tuning.to_dict()}, True)
        return
    name = metric_name(tuning.metric)
    lines: dict[str, Any] = {"adapter": shown(adapter), "texts": tuning.texts}
    lines["PLM alone"] = f"{name} {score_text(tuning.metric, tuning.plm_alone)}"
    for schedule, score in tuning.scores:
        mark = "  (stored)" if schedule == tuning.best else ""
        lines[str(schedule)] = f"{name} {score_text(tuning.metric, score)}{mark}"
    show(lines, False)
