"""Training in several processes: the losses, weights and files of one, however many, and whatever ends one of them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from made_memories import make_memory
from safetensors.torch import load_file

from launched import LIMIT, launch, settings
from pema.adapter import sampled
from pema.adapter.checkpoint import Checkpoint
from pema.adapter.config import SAMPLE
from pema.adapter.dropout import Dropout
from pema.adapter.joint import JointRun
from pema.adapter.optimisation import add_gradients
from pema.adapter.presets import preset
from pema.adapter.training import train
from pema.errors import ConfigError
from pema.files import read_json
from pema.processes import Processes

COMMON = {"epochs": 2, "log_every": 1, "precision": "float32", "checkpoint_every": 2}
CASES = {
    # The last batch of an epoch has fewer pairs than there are processes: 145 pairs = 4 * 36 + 1.
    "paper": ("plain", "paper", {"rank": 6, "batch_size": 36}),
    "sgd": ("plain", "paper", {"rank": 6, "batch_size": 36, "reconstruction": "sgd", "reconstruction_epochs": 2}),
    "residual": ("plain", "residual", {"rank": 16, "batch_size": 36, "clip": 0.5}),
    "sampled": ("wide", "residual", {"rank": 16, "batch_size": 36, "vocabulary": "sampled"}),
    "copying": ("prompts", "best", {"rank": 16, "copy_width": 8, "batch_size": 24}),
}
KINDS = {"plain": {}, "wide": {"V": SAMPLE + 60, "used": 40}, "prompts": {"prompts": True}}
TIMES = ("seconds", "pairs_per_second", "train_seconds", "reconstruction_seconds")


@pytest.fixture(scope="module")
def memories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    return {name: make_memory(folder / name, examples=30, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def alone(memories, tmp_path_factory):
    """The folders of the trainings in this process, by case."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def of(case):
        if case not in done:
            memory, name, changes = CASES[case]
            train(memories[memory], preset(name, **COMMON | changes), folder / case)
            done[case] = folder / case
        return done[case]

    return of


def command(memories, case, output, *more):
    memory, name, changes = CASES[case]
    places = [str(memories[memory].path), "-o", str(output)]
    return ["train", *places, "--preset", name, *settings(**COMMON | changes), *more]


def numbers(values, path=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}{name}.")
        elif isinstance(value, int | float) and name not in TIMES:
            yield path + name, value


def assert_same(folder, expected):
    logs = [[json.loads(line) for line in (each / "training.jsonl").open()] for each in (folder, expected)]
    assert len(logs[0]) == len(logs[1])
    for line, wanted in zip(*logs, strict=True):
        assert dict(numbers(line)) == pytest.approx(dict(numbers(wanted)), rel=1e-5, abs=1e-6)
    tensors, wanted = (load_file(each / "adapter_model.safetensors") for each in (folder, expected))
    assert tensors.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(tensors[name], wanted[name], rtol=1e-4, atol=1e-5)
    configs = [read_json(each / "adapter_config.json")["pema"] for each in (folder, expected)]
    assert configs[0]["fitted"]["values"] == pytest.approx(configs[1]["fitted"]["values"], abs=1e-4)
    assert dict(numbers(configs[0]["training"]["figures"])) == pytest.approx(
        dict(numbers(configs[1]["training"]["figures"])), rel=1e-5, abs=1e-6
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in expected.iterdir())


@pytest.mark.parametrize(("case", "count"), [("paper", 2), ("sgd", 2), ("residual", 3), ("sampled", 2), ("copying", 2)])
def test_it_is_the_training_of_one_process_and_one_process_writes(case, count, memories, alone, tmp_path):
    codes, out, err = launch(tmp_path / "printed", count, *command(memories, case, tmp_path / "adapter-{rank}"))
    assert codes == [0] * count, err
    assert_same(tmp_path / "adapter-0", alone(case))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-0", "printed"]
    assert "held out loss" in out[0]
    assert out[1:] == err[1:] == [""] * (count - 1)


def test_it_resumes_with_another_number_of_processes_after_a_kill(memories, alone, tmp_path):
    # 4 steps an epoch and a checkpoint each 2: the process is killed in its second epoch, after a checkpoint.
    output = tmp_path / "adapter"
    for count, plant in ((2, (1, "step", 4, "kill")), (1, (0, "step", 3, "kill")), (3, (0, "end_epoch", 1, "kill"))):
        codes, _, err = launch(
            tmp_path / "printed", count, *command(memories, "copying", output, "--resume"), plant=plant
        )
        assert codes[plant[0]] == -9
        assert all(code for code in codes)
        messages = "".join(err)
        assert messages.count("pema: ") == (count > 1), err
        assert count == 1 or "another process of this command has ended or does not answer: its message" in messages
    codes, _, err = launch(tmp_path / "printed", 2, *command(memories, "copying", output, "--resume"))
    assert codes == [0, 0], err
    assert_same(output, alone("copying"))
    # The adapter of a run that has ended is returned in all processes.
    codes, _, err = launch(tmp_path / "printed", 2, *command(memories, "copying", output, "--resume"))
    assert codes == [0, 0], err
    assert_same(output, alone("copying"))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_with_one_message(rank, memories, tmp_path):
    case = command(memories, "paper", tmp_path / "adapter")
    codes, _, err = launch(tmp_path / "printed", 2, *case, plant=(rank, "step", 3, "raise"))
    assert codes == [1, 1]
    assert "".join(err).count("pema: ") == 1
    assert "pema: a planted fault." in err[rank]


def test_an_error_in_all_processes_is_told_once(memories, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    codes, _, err = launch(tmp_path / "printed", 2, *command(memories, "paper", tmp_path / "adapter"))
    assert codes == [1, 1]
    assert "".join(err).count("pema: ") == 1
    assert "already contains an adapter" in "".join(err)


def test_accelerate_launches_it(memories, alone, tmp_path):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words += ["--main_process_port", "0", "-m", "pema", *command(memories, "paper", tmp_path / "adapter")]
    path = os.pathsep.join(str(each) for each in sys.path if each)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out loss") == 1
    assert_same(tmp_path / "adapter", alone("paper"))


def test_private_training_is_refused(memories, tmp_path, monkeypatch):
    monkeypatch.setattr("pema.adapter.training.join", lambda: Processes(0, 2))
    private = preset("private", dp_epsilon=3.0, dp_delta=1e-3, rank=8, batch_size=10)
    with pytest.raises(ConfigError, match="dp_epsilon with 2 processes: private training runs in one"):
        train(memories["plain"], private, tmp_path / "adapter")


@pytest.mark.parametrize("count", [2, 3])
def test_the_masks_of_parts_are_those_of_the_batch(count):
    x, common = torch.ones(10, 7), torch.ones(4, 3)
    dropout = Dropout(0.5, 3, torch.device("cpu"))

    def drop(mask, rows):
        return [mask.common(common), mask(rows), mask(torch.cat((rows, rows), 1))]

    whole = drop(dropout.at(5), x)
    assert not torch.equal(whole[1], x)
    parts = []
    for rank in range(count):
        own = Processes(rank, count).part(10)
        parts.append(drop(dropout.at(5, own.start, 10), x[own]))
    for k, each in enumerate(zip(*parts, strict=True)):
        if k == 0:
            assert all(torch.equal(part, whole[0]) for part in each)
        else:
            assert torch.equal(torch.cat(each), whole[k])


def test_a_parameter_without_a_gradient_in_all_processes_keeps_none():
    class Two(Processes):
        def add(self, tensor):
            return tensor.add_(other)

    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0])
    other = torch.tensor([10.0, 20.0, 3.0, 4.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    add_gradients(parameters, Two(0, 2))
    assert [None if p.grad is None else p.grad.tolist() for p in parameters] == [[11.0, 22.0], [3.0, 4.0], None]


def test_the_sample_of_a_step_is_the_same_in_all_processes(memories):
    head, tokens = memories["wide"].head(), memories["wide"].view().targets_seen()
    first, second = (sampled.SampledCrossEntropy(head, tokens, seed=3) for _ in range(2))
    assert torch.equal(first.at(4).W_hd, second.at(4).W_hd)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_process_without_pairs_reads_no_prompts(memories, tmp_path, dropout):
    settings = {"rank": 16, "copy_width": 8, "batch_size": 2, "dropout": dropout}
    config = preset("best", **COMMON | settings)
    run = JointRun(memories["prompts"], config, tmp_path, Checkpoint(tmp_path, config, "0"), tensorboard=False)
    for rank in (0, 2):  # of the two pairs of a batch the first of three processes has none
        run.processes = Processes(rank, 3)
        parts = list(run.parts())
        assert {len(part.batch.rows) for part, _ in parts} == {rank // 2}
        for part, context in parts:
            assert (context is None) == (rank == 0)
            assert context is None or len(context.prompt) == (len(part.rows) if dropout else 1)
