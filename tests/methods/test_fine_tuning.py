"""The loop of all methods that train through the PLM, and full fine-tuning."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.methods.made_jobs import EXAMPLES, SOURCES, TASK, job, run, save_plm
from tests.tiny import EOS, build_model, build_tokenizer

from pema.adapter.optimisation import course
from pema.errors import AdapterError, ConfigError, MismatchError, OwnerError
from pema.memory.build import build_memory
from pema.methods.contract import TrainingReport
from pema.methods.fine_tuning import batches, fine_tune
from pema.methods.full import FILE, FullFineTuning
from pema.methods.plm_alone import PLMAlone
from pema.methods.targets import cross_entropy, encode, mean_cross_entropy
from pema.methods.tuned import twin
from pema.owner.local import LocalPLM
from pema.owner.weights import fingerprint
from pema.tasks.held_out import draw_held_out

METHOD = FullFineTuning(learning_rate=3e-3, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_plm(tmp_path_factory.mktemp("plm") / "tiny")


@pytest.fixture(scope="module")
def plm(folder):
    return LocalPLM.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    return run(METHOD, job(folder), tmp_path_factory.mktemp("full"))


def slow_log_probs(model, prompt, target):
    """log P of each target token, one context at a time."""
    found = []
    for i, token in enumerate(target):
        logits = model(input_ids=torch.tensor([[*prompt, *target[:i]]])).logits[0, -1]
        found.append(logits.float().log_softmax(-1)[token])
    return torch.stack(found)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_loss_and_its_gradient_are_those_of_a_slow_loop(family):
    model = build_model(family)
    plm = LocalPLM(model, build_tokenizer())
    tokens = encode(plm, TASK.template, EXAMPLES[:4])
    assert len({int(n) for n in tokens.starts[1:] - tokens.starts[:-1]}) > 1  # so there is padding
    loss, count = cross_entropy(model, tokens, [2, 0, 3, 1])
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    encoded = TASK.template.encode(plm.tokenizer, EXAMPLES[:4])
    slow = torch.cat([slow_log_probs(model, each.prompt, each.target) for each in encoded])
    (-slow.sum()).backward()
    assert count == len(slow) == sum(len(each.target) for each in encoded)
    assert all(each.target[-1] == EOS for each in encoded)
    torch.testing.assert_close(loss, -slow.sum(), rtol=1e-5, atol=1e-5)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-4)


def test_the_mean_is_over_tokens_whatever_the_batches(plm, monkeypatch):
    tokens = encode(plm, TASK.template, EXAMPLES)
    whole = mean_cross_entropy(plm.model, tokens, range(len(EXAMPLES)))
    loss, count = cross_entropy(plm.model, tokens, range(len(EXAMPLES)))
    assert whole == pytest.approx(float(loss.detach()) / count, rel=1e-6)
    monkeypatch.setattr("pema.methods.targets.LOGITS_BYTES", 1)
    assert mean_cross_entropy(plm.model, tokens, range(len(EXAMPLES))) == pytest.approx(whole, rel=1e-6)


def test_perplexity_is_that_of_the_plm_alone_where_nothing_was_trained(plm, folder, tmp_path):
    method = dataclasses.replace(METHOD, learning_rate=1e-30)
    _, output = run(method, job(folder, epochs=1), tmp_path)
    with (
        PLMAlone().open(plm, job(folder), tmp_path, tmp_path) as alone,
        method.open(plm, job(folder), tmp_path, output) as adapted,
    ):
        assert adapted.perplexity(EXAMPLES) == pytest.approx(alone.perplexity(EXAMPLES), rel=1e-4)
        assert adapted.generate(SOURCES) == alone.generate(SOURCES)


def test_training_lowers_the_perplexity_and_does_not_change_the_plm(plm, folder, trained):
    figures, output = trained
    before = fingerprint(plm.model)
    tokens = torch.tensor([[1, 7, 8, 9]])
    logits = plm.model(input_ids=tokens).logits
    alone = PLMAlone().open(plm, job(folder), output, output)
    with METHOD.open(plm, job(folder), output, output) as adapted:
        assert adapted.perplexity(EXAMPLES) < 0.5 * alone.perplexity(EXAMPLES)
        assert adapted.generate(SOURCES).texts != alone.generate(SOURCES).texts
        assert torch.equal(plm.model(input_ids=tokens).logits, logits)
        assert adapted.disk_bytes == (output / FILE).stat().st_size > 4 * figures.trainable_parameters
    assert fingerprint(plm.model) == before
    assert figures.trainable_parameters == plm.description.parameters
    assert FullFineTuning().needs.weights == "all"
    assert FullFineTuning().needs.targets_at_owner
    assert FullFineTuning().needs.gradients


def test_a_text_does_not_depend_on_its_batch(plm, folder, trained):
    with METHOD.open(plm, job(folder), trained[1], trained[1]) as adapted:
        together = adapted.generate(SOURCES)
        assert together.texts == [adapted.generate([source]).texts[0] for source in SOURCES]
        assert together == adapted.generate(SOURCES, batch_size=2)


def test_the_same_seed_trains_the_same_weights(folder, trained, tmp_path):
    figures, output = trained
    again, there = run(METHOD, job(folder), tmp_path / "again")
    _, other = run(METHOD, job(folder, seed=1), tmp_path / "other")
    assert (there / FILE).read_bytes() == (output / FILE).read_bytes() != (other / FILE).read_bytes()
    losses = [[point["held_out_loss"] for point in each.curve] for each in (figures, again)]
    assert losses[0] == losses[1]


def test_training_does_not_touch_the_random_state_of_others(folder, tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    run(METHOD, job(folder, epochs=1), tmp_path)
    assert torch.equal(torch.rand(1), wanted)


def test_early_stopping_keeps_the_weights_with_the_lowest_held_out_loss(plm, folder, tmp_path):
    method, given = dataclasses.replace(METHOD, learning_rate=0.05, epochs=20), job(folder, epochs=20, patience=2)
    figures, output = run(method, given, tmp_path)
    losses = [point["held_out_loss"] for point in figures.curve]
    best = losses.index(min(losses))
    assert 0 < best == len(losses) - 3 < 18
    _, held_out = draw_held_out(len(EXAMPLES), given.budget.dev_fraction, given.seed, "")
    with method.open(plm, given, tmp_path, output) as adapted:
        found = adapted.perplexity([EXAMPLES[i] for i in held_out])
    assert math.log(found) == pytest.approx(losses[best], abs=1e-5)


def test_the_curve_begins_before_training_and_has_a_point_an_epoch(folder, trained):
    curve = trained[0].curve
    assert [point["epoch"] for point in curve] == [0, 1, 2, 3]
    assert "train_loss" not in curve[0]
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(curve))
    assert curve[3]["train_loss"] < curve[1]["train_loss"]
    assert trained[0].seconds >= curve[-1]["seconds"]


def test_epochs_are_the_fewer_of_the_settings_and_the_budgets(folder, tmp_path):
    method = dataclasses.replace(METHOD, epochs=1)
    assert len(run(method, job(folder, epochs=5), tmp_path / "one")[0].curve) == 2
    assert len(run(METHOD, job(folder, epochs=2), tmp_path / "two")[0].curve) == 3


def test_training_stops_when_its_seconds_are_over(folder, tmp_path, monkeypatch):
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (steps.append(self), step(self, *a))[1])
    method = dataclasses.replace(METHOD, seconds=1e-6)
    figures, output = run(method, job(folder, epochs=50), tmp_path)
    assert len(steps) == 1
    assert [point["epoch"] for point in figures.curve] == [0, 1]
    assert (output / FILE).exists()


def test_the_learning_rate_follows_its_course(folder, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]
    )
    run(dataclasses.replace(METHOD, warmup=0.5), job(folder, epochs=2), tmp_path)
    wanted = [METHOD.learning_rate * course((k + 0.5) / 6, 0.5) for k in range(6)]
    assert rates == pytest.approx(wanted)


def test_batches_contain_every_example_once_and_examples_of_one_length(plm):
    tokens = encode(plm, TASK.template, EXAMPLES * 10)
    which = np.arange(3, 113)
    found = list(batches(tokens, which, 8, np.random.default_rng(0)))
    assert sorted(itertools.chain(*found)) == which.tolist()
    assert [len(batch) for batch in found].count(8) == len(which) // 8
    lengths = tokens.starts[1:] - tokens.starts[:-1]
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in found)
    assert padded < 1.05 * lengths[which].sum()
    assert found == list(batches(tokens, which, 8, np.random.default_rng(0)))
    assert found != list(batches(tokens, which, 8, np.random.default_rng(1)))


def test_the_held_out_examples_are_those_of_a_memory(plm, tmp_path):
    memory = build_memory(plm, EXAMPLES, TASK, tmp_path / "memory")
    for seed in range(3):
        views = memory.split(0.25, seed)
        drawn = draw_held_out(len(EXAMPLES), 0.25, seed, "")
        assert [view.selected.tolist() for view in views] == [numbers.tolist() for numbers in drawn]
        assert sorted(itertools.chain(*drawn)) == list(range(len(EXAMPLES)))
        assert len(drawn[1]) == 3


def test_one_example_cannot_be_split(folder, tmp_path):
    with pytest.raises(ConfigError, match="the training set contains 1 example: a split needs at least two"):
        run(METHOD, job(folder, examples=EXAMPLES[:1]), tmp_path)


@pytest.mark.parametrize(("batch_size", "step"), [(4, 2), (99, 1)])
def test_a_training_that_diverges_stops_and_keeps_the_best_weights(folder, tmp_path, batch_size, step):
    method = dataclasses.replace(METHOD, learning_rate=1e30, batch_size=batch_size)
    report, output = run(method, job(folder), tmp_path)
    assert report.diverged_at == step
    assert (report.best_epoch, report.helped) == (0, False)
    assert report.divergence == (
        f"training diverged: a loss is not finite at step {step}; the weights of epoch 0 are kept. "
        "Lower learning_rate, or lengthen the warm-up."
    )
    assert TrainingReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    plm = LocalPLM.load(folder, dtype="float32")
    with method.open(plm, job(folder), tmp_path, output) as adapted:
        kept = dict(adapted.model.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in plm.model.named_parameters())


def test_whether_training_helped():
    points = [{"epoch": epoch, "held_out_loss": loss} for epoch, loss in enumerate((2.0, 1.0, 1.5))]
    assert (TrainingReport(1, 0.0, tuple(points)).best_epoch, TrainingReport(1, 0.0, tuple(points)).helped) == (1, True)
    worse = ({"epoch": 0, "held_out_loss": 0.5}, *points[1:])
    assert (TrainingReport(1, 0.0, worse).best_epoch, TrainingReport(1, 0.0, worse).helped) == (0, False)
    assert (TrainingReport(0, 0.0).best_epoch, TrainingReport(0, 0.0).helped) == (None, None)
    assert TrainingReport(0, 0.0).divergence == ""


def test_a_plm_whose_own_loss_is_not_finite_is_not_trained(folder, tmp_path):
    plm = LocalPLM.load(folder, dtype="float32")
    tokens = encode(plm, TASK.template, EXAMPLES)
    plm.model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(AdapterError, match=r"the held-out loss is nan before training, so the PLM itself causes it"):
        fine_tune(plm.model, tokens, METHOD, job(folder), lambda: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, r"full: learning_rate=0\.0 is too small: it must be more than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be finite"),
        ({"batch_size": 0}, "batch_size=0 is too small: it must be at least 1"),
        ({"epochs": 0}, "epochs=0 is too small: it must be at least 1"),
        ({"warmup": 1.0}, r"warmup=1\.0 is too large: it must be less than 1"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0 is too small: it must be at least 0"),
        ({"seconds": 0.0}, r"seconds=0\.0 is too small: it must be more than 0"),
        ({"rank": 4}, "unknown setting 'rank' of full: use learning_rate"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FullFineTuning.of(settings)


def test_weights_that_cannot_be_used_are_refused(plm, folder, trained, tmp_path):
    with pytest.raises(AdapterError, match=r"model.safetensors cannot be read .*: train again"):
        METHOD.open(plm, job(folder), tmp_path, tmp_path)
    (tmp_path / FILE).write_bytes((trained[1] / FILE).read_bytes()[:-9])
    with pytest.raises(AdapterError, match=r"model.safetensors cannot be read .*: train again"):
        METHOD.open(plm, job(folder), tmp_path, tmp_path)
    stored = load_file(trained[1] / FILE)
    name = "model.norm.weight"
    save_file(stored | {name: torch.ones(3)}, tmp_path / FILE)
    with pytest.raises(
        MismatchError, match=rf"was trained on another PLM: {name} \(3,\) has shape \(32,\) in this PLM"
    ):
        METHOD.open(plm, job(folder), tmp_path, tmp_path)
    save_file({"ours": stored[name]}, tmp_path / FILE)
    with pytest.raises(MismatchError, match=r"ours \(32,\) is not a weight of this PLM"):
        METHOD.open(plm, job(folder), tmp_path, tmp_path)


def test_a_twin_shares_memory_until_its_weights_are_replaced():
    model = build_model("opt")
    found = twin(model)
    theirs, mine = dict(model.named_parameters()), dict(found.named_parameters())
    assert type(found) is type(model)
    assert theirs.keys() == mine.keys()  # tied weights are tied in both
    assert all(theirs[name].data_ptr() == mine[name].data_ptr() for name in theirs)
    kept = {name: p.detach().clone() for name, p in theirs.items()}
    for p in mine.values():
        p.data = torch.zeros_like(p)
    assert all(torch.equal(p, kept[name]) for name, p in theirs.items())
    assert float(found(input_ids=torch.tensor([[1, 2]])).logits.detach().abs().max()) == 0


def test_a_plm_spread_over_devices_has_no_twin():
    model = build_model()
    model.model.layers[0]._hf_hook = object()
    with pytest.raises(OwnerError, match="LlamaForCausalLM are spread over several devices by accelerate"):
        twin(model)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_mixed_precision_learns_as_float32_does(tmp_path, family):
    folder = save_plm(tmp_path / "plm", family, dtype=torch.bfloat16)
    losses = {}
    for precision in ("float32", "bfloat16"):
        given = dataclasses.replace(job(folder, epochs=3), plm_dtype=precision)
        report, _ = run(METHOD, given, tmp_path / precision)
        losses[precision] = [point["held_out_loss"] for point in report.curve]
    assert losses["float32"][-1] < 0.9 * losses["float32"][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_small_steps_are_not_lost_in_bfloat16(tmp_path):
    """Half a unit in the last place of a bfloat16 weight of 0.02 is 3e-5: smaller steps would round to nothing."""
    folder, learning_rate = save_plm(tmp_path / "plm", dtype=torch.bfloat16), 2e-5
    given = dataclasses.replace(job(folder, epochs=8), plm_dtype="bfloat16")
    report, output = run(FullFineTuning(learning_rate=learning_rate, batch_size=4), given, tmp_path)
    before = LocalPLM.load(folder, dtype="bfloat16").model.state_dict()
    kept = load_file(output / FILE)
    assert report.helped
    assert {weight.dtype for weight in kept.values()} == {torch.float32}
    moved = [(weight - before[name].float()).abs().max().item() for name, weight in kept.items()]
    assert 0 < max(moved) < 8 * learning_rate * len(EXAMPLES)
    assert sum(change > 0 for change in moved) > len(moved) / 2
