"""One training in its own process, so that its peak memory can be measured.

The process, `python -m pema.experiments.training_process`, reads a job from a file, trains, and writes a folder with
the method's files and `trained.json`: the method's figures and `train_peak_bytes`, the peak resident memory without
that of the libraries.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pema.errors import AdapterError, PemaError
from pema.experiments.peak import peak_above, reset_peak, resident
from pema.files import read_json, write_json, writing
from pema.lifeline import PYTHON, child, end_with_parent
from pema.methods.contract import Budget, Job, Method
from pema.tasks.example import Example
from pema.tasks.registry import get_task

TRAINED = "trained.json"

LIBRARIES = (
    *("transformers.models.auto.modeling_auto", "faiss", "peft"),
    *("pema.adapter.training", "pema.memory.build", "pema.methods.distillation", "pema.methods.tuned"),
)
"""Modules that the stages of methods import, with the libraries behind them."""


def train_in_process(method: Method, job: Job, prepared: Path, output: Path) -> dict[str, Any]:
    """Train in a new process, which writes `output` atomically.

    Returns:
        The content of `trained.json` in `output`.

    Raises:
        PemaError: the training failed, or its process was killed.
    """
    with tempfile.TemporaryDirectory(prefix="pema-job-") as folder:
        order, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        write_json(order, _written(method, job, prepared, output))
        command = [*PYTHON, "-m", "pema.experiments.training_process", str(order), str(answer)]
        with child(command) as process:
            assert process.stderr is not None
            errors = process.stderr.read()
            code = process.wait()
        report = read_json(answer) if answer.exists() else {}
    if "error" in report:
        raise AdapterError(f"{method.name}: {report['error']}")
    if code:
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        last = (errors.strip().splitlines() or ["no error output"])[-1]
        raise AdapterError(f"{method.name}: the training process {ended} ({last}). Check that there is enough memory.")
    return read_json(output / TRAINED)


def _written(method: Method, job: Job, prepared: Path, output: Path) -> dict[str, Any]:
    from pema.methods.registry import method_name

    return {
        "method": method_name(type(method)),
        "settings": method.settings(),
        "prepared": str(prepared.resolve()),
        "output": str(output.resolve()),
        "plm": job.plm,
        "plm_dtype": job.plm_dtype,
        "task": job.task.name,
        "template": job.task.template.text,
        "chat": job.task.template.chat,
        "system": job.task.template.system,
        "train": [example.to_list() for example in job.train],
        "dev": [example.to_list() for example in job.dev],
        "seed": job.seed,
        "budget": asdict(job.budget),
        "device": job.device,
    }


def _read(order: dict[str, Any]) -> tuple[Method, Job]:
    from pema.methods.registry import get_method

    method = get_method(order["method"]).of(order["settings"])
    train, dev = (tuple(map(Example.of_list, order[part])) for part in ("train", "dev"))
    task = get_task(order["task"], order["template"], chat=order["chat"], system=order["system"])
    budget = Budget(**order["budget"])
    given = (order["plm"], order["plm_dtype"], task, train, dev, order["seed"], budget, order["device"])
    return method, Job(*given)


def _load_libraries() -> None:
    """Import the libraries of all methods, so that the memory of each method is measured from the same baseline.

    The first step of an optimizer makes torch import its compiler, so a small step is taken here.
    """
    import torch

    for name in LIBRARIES:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.zeros(1, 2)).sum().backward()
    optimizer.step()


def run(order: dict[str, Any]) -> None:
    """Train as the job file says."""
    import torch

    method, job = _read(order)
    _load_libraries()
    reset_peak()
    before, _ = resident()
    with writing(Path(order["output"])) as temporary:
        temporary.mkdir()
        trained = method.train(job, Path(order["prepared"]), temporary)
        figures = trained.to_dict() | {"train_peak_bytes": peak_above(before)}
        if torch.cuda.is_available():
            figures["train_peak_accelerator_bytes"] = torch.cuda.max_memory_allocated()
        write_json(temporary / TRAINED, figures)


def main() -> None:
    """Run the job in the first file; an error is written to the second."""
    end_with_parent()
    order, answer = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        run(read_json(order))
    except PemaError as error:
        write_json(answer, {"error": str(error)})
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeError if memory cannot be allocated.
        write_json(answer, {"error": f"the training failed: {json.dumps(str(error))}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
