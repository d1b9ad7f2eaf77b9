"""The origin of every number: each run's scores, settings, costs and signature, folded under its method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from pema.evaluation.notation import NOTHING, metric_name, score_text
from pema.experiments.records import Point, Results, Run, Signature, Trial


def all_runs(experiment: Results, key: str) -> str:
    """Return one disclosure per method, with one per run in it; the table and the plots link to them."""
    methods = "\n".join(
        f'<details class="method" id="{key}-m{row}"><summary>{escape(label)} '
        f'<span class="muted">{_count(len(experiment.runs[label]), "run")}</span></summary>\n'
        + "\n".join(_run(run, experiment.metrics) for run in experiment.runs[label])
        + "\n</details>"
        for row, label in enumerate(experiment.about.methods)
    )
    whole = _signature(experiment.about.signature)
    return f'{methods}\n<details class="method"><summary>The experiment as a whole</summary>\n{whole}</details>'


def _run(run: Run, metrics: Iterable[str]) -> str:
    # The text of the table in the summary; below, to reproduce a score, all its digits.
    scores = [(metric_name(metric), run.scores[metric]) for metric in metrics]
    values = " · ".join(f"{metric_name(metric)} {score_text(metric, run.scores[metric].value)}" for metric in metrics)
    parts = [
        _list("Scores", [(name, f"{score.value:.6g}  ({score.signature})") for name, score in scores]),
        _list("Settings", [("method", run.method), *_flat(run.settings)]),
        _list("On dev data", [("perplexity", run.dev_perplexity), *_flat(run.chosen, "chosen ")]),
        _list("Costs and needs", [*_flat(run.costs.to_dict()), *_flat(run.needs.to_dict(), "needs ")]),
        _signature(run.signature),
        _trials(run.trials, run.signature.config.get("choose_by")),
        _curve(run.curve),
    ]
    return (
        f'<details class="run"><summary><b>{escape(run.run)}</b> <span class="muted">seed {run.seed} · '
        f"{escape(values)}</span></summary>\n{''.join(parts)}</details>"
    )


def _signature(signature: Signature) -> str:
    config = json.dumps(signature.config, indent=2, ensure_ascii=False)
    known = [
        ("commit", signature.commit or "not run from a checkout"),
        ("time", signature.time),
        ("seed", signature.seed),
        *_flat(signature.versions),
        *_flat(signature.machine),
    ]
    return f'{_list("Signature", known)}<p class="part">Config</p><pre tabindex="0">{escape(config)}</pre>'


def _trials(trials: Iterable[Trial], metric: str | None) -> str:
    """Return the candidates with their perplexity, and with their score by the metric that chose among them."""
    rows = [
        (
            ", ".join(f"{name} {value}" for name, value in _flat(trial.settings)),
            _written(trial.dev_perplexity)
            if metric is None
            else f"{score_text(metric, trial.dev_score)}; {_written(trial.dev_perplexity)}",
        )
        for trial in trials
    ]
    chosen = "" if metric is None else f"{metric_name(metric)} of generated texts (which decided); "
    return _list(f"Tried on dev data: {chosen}dev perplexity", rows)


def _curve(curve: Iterable[Point]) -> str:
    rows = [(f"epoch {point.epoch:g}, {_written(point.seconds)} s", _written(point.held_out_loss)) for point in curve]
    return _list("Held-out loss", rows)


def _list(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_written(value))}</dd>" for name, value in rows)
    return f'<p class="part">{escape(title)}</p><dl>{items}</dl>' if items else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}".replace("_", " "), value))
    return flat


def _written(value: Any) -> str:  # noqa: ANN401
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
