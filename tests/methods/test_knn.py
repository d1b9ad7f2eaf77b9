"""kNN-LM against slow obvious loops, on tiny PLMs."""

import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import build_model, build_tokenizer

from pema.errors import ConfigError, ExternalMemoryError, MismatchError, StorageError
from pema.files import digest, sha256, size
from pema.generation.batches import plain
from pema.generation.decoding import decode
from pema.generation.texts import text_of
from pema.memory.reader import Memory
from pema.methods import knn_index, knn_mixture
from pema.methods.adapted.neighbouring import measure
from pema.methods.contract import Budget, Job
from pema.methods.knn import INDEX, KNN, KS
from pema.methods.knn_index import FILE, TARGETS, VECTORS, Index, Neighbours
from pema.methods.knn_mixture import SHARES, MixtureSettings, TokenMeasurements, choose, log_p_mixed, mixed, plugged
from pema.methods.on_memory import MEMORY, memory_of
from pema.methods.pema import PEMA
from pema.methods.plm_alone import PLMAlone
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.registry import get_task

TASK = get_task("translation")
EXAMPLES = tuple(Example(f"the house {i}", f"das Haus {i} ist klein") for i in range(12))
DEV = tuple(Example(f"the dog {i}", f"das Haus {i} ist hier") for i in range(4))
SOURCES = [example.source for example in EXAMPLES[:5]]
FIXED = {"k": 7, "temperature": 3.0, "weight": 0.6}


def job(**changes):
    return replace(Job("tiny", None, TASK, EXAMPLES, DEV, 0, Budget()), **changes)


def folders(plm, folder, method, given):
    (folder / "prepared").mkdir()
    (folder / "trained").mkdir()
    method.prepare(plm, given, folder / "prepared")
    trained = method.train(given, folder / "prepared", folder / "trained")
    return folder / "prepared", folder / "trained", trained


@pytest.fixture(scope="module")
def plm():
    return LocalPLM(build_model(), build_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def made(plm, tmp_path_factory):
    return folders(plm, tmp_path_factory.mktemp("knn"), KNN(dtype="float32"), job())


@pytest.fixture(scope="module")
def index(plm, made):
    return Index.load(made[1] / INDEX, plm.description)


@pytest.fixture(scope="module")
def pairs(made):
    return pairs_of(made[0] / MEMORY)


def pairs_of(folder):
    (batch,) = Memory.open(folder).view().batches(10_000)
    return list(zip(batch.representations.double().numpy(), batch.targets.tolist(), strict=True))


def opened(plm, made, given=None, **settings):
    return KNN.of({"dtype": "float32"} | settings).open(plm, given or job(), made[0], made[1])


def slow_p_knn(pairs, f, k, temperature, vocabulary_size):
    """The paper's equation 2, a pair at a time."""
    f = f.double().numpy()
    nearest = sorted((sum((f - key) ** 2), y) for key, y in pairs)[:k]
    p = np.zeros(vocabulary_size)
    for distance, y in nearest:
        p[y] += math.exp(-(distance - nearest[0][0]) / temperature)
    return p / p.sum()


def slow_p(plm, pairs, context, k, temperature, weight):
    """The mixture after a context, from the whole context and without a cache."""
    with torch.no_grad():
        f = plm.model.model(torch.tensor([context])).last_hidden_state[0, -1]
        p_plm = torch.softmax(plm.model.lm_head(f), -1).double().numpy()
    return weight * slow_p_knn(pairs, f, k, temperature, len(p_plm)) + (1 - weight) * p_plm


def slow_tokens(plm, pairs, source, settings):
    prompt = TASK.template.encode_prompts(plm.tokenizer, [source])[0]
    tokens = []
    while len(tokens) < 2 * prompt.source_length + 16 and (not tokens or tokens[-1] != plm.tokenizer.eos_token_id):
        tokens.append(int(slow_p(plm, pairs, [*prompt.prompt, *tokens], **settings).argmax()))
    return tokens


def test_the_distribution_is_that_of_a_slow_loop(plm, index, pairs):
    f = torch.randn(9, plm.description.d, generator=torch.Generator().manual_seed(1))
    f[3] = torch.tensor(pairs[5][0])
    logits = torch.randn(9, plm.description.vocabulary_size, generator=torch.Generator().manual_seed(2))
    neighbours = index.search(f, 20)
    assert min(len(set(row)) for row in neighbours.targets.tolist()) < 20, "no two neighbours share a target"
    assert (neighbours.distances.diff(dim=1) >= 0).all()
    assert float(neighbours.distances[3, 0]) == pytest.approx(0, abs=1e-4)
    found = mixed(logits, neighbours, 5.0, 0.3).exp()
    for row in range(9):
        p_plm = torch.softmax(logits[row].double(), -1).numpy()
        slow = 0.3 * slow_p_knn(pairs, f[row], 20, 5.0, len(p_plm)) + 0.7 * p_plm
        assert np.allclose(found[row].numpy(), slow, atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(9), atol=1e-5)


def test_few_queries_and_many_find_the_same(index):
    f = torch.randn(9, 32, generator=torch.Generator().manual_seed(5))
    together, apart = index.search(f, 6), [index.search(row[None], 6) for row in f]
    assert torch.equal(together.targets, torch.cat([one.targets for one in apart]))
    assert torch.allclose(together.distances, torch.cat([one.distances for one in apart]), rtol=1e-4)


def test_more_neighbours_than_pairs_are_all_pairs(index, pairs):
    assert index.search(torch.zeros(2, 32), 10_000).targets.shape == (2, len(pairs))


def test_where_no_neighbour_is_found_the_plm_is_alone():
    none = Neighbours(torch.full((1, 3), torch.inf), torch.zeros(1, 3, dtype=torch.int64))
    logits = torch.randn(1, 11, generator=torch.Generator().manual_seed(0))
    alone = torch.log_softmax(logits, -1)
    assert torch.equal(mixed(logits, none, 1.0, 0.9), alone)
    assert torch.equal(
        log_p_mixed(TokenMeasurements(alone[:, 4], none, torch.tensor([4])), MixtureSettings(3, 1.0, 0.9)), alone[:, 4]
    )


def test_neighbours_that_are_missing_have_no_share():
    some = Neighbours(torch.tensor([[1.0, torch.inf]]), torch.tensor([[4, 0]]))
    found = mixed(torch.zeros(1, 11), some, 1.0, 1.0)
    assert found[0].exp().tolist() == [0.0] * 4 + [1.0] + [0.0] * 6


def test_of_an_approximate_index_too_few_neighbours_may_come(plm, made, monkeypatch):
    monkeypatch.setattr(knn_index, "PROBES", 1)
    sparse = Index.build(Memory.open(made[0] / MEMORY), "IVF8,Flat")
    found = sparse.search(torch.zeros(1, 32), len(sparse))
    assert not found.distances.isfinite().all()
    assert bool((found.targets[~found.distances.isfinite()] == 0).all())


def test_an_inverted_file_of_which_all_cells_are_probed_is_exact(made, index):
    probed = Index.build(Memory.open(made[0] / MEMORY), "IVF4,Flat")
    f = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(probed.search(f, 5).distances, index.search(f, 5).distances, rtol=1e-4)
    assert torch.equal(probed.search(f, 5).targets, index.search(f, 5).targets)


def test_without_weight_it_is_the_plm_token_for_token(plm, made, tmp_path):
    with (
        PLMAlone().open(plm, job(), tmp_path, tmp_path) as alone,
        opened(plm, made, k=4, temperature=1.0, weight=0.0) as adapted,
    ):
        assert adapted.generate(SOURCES) == alone.generate(SOURCES)
        assert adapted.perplexity(DEV) == pytest.approx(alone.perplexity(DEV), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contexts_that_recur_have_their_targets_again(plm, tmp_path, dtype):
    made = folders(plm, tmp_path, KNN(dtype=dtype), job())
    with opened(plm, made, k=1, temperature=1.0, weight=1.0) as adapted:
        assert adapted.generate(SOURCES).texts == [example.target for example in EXAMPLES[:5]]
        assert adapted.perplexity(EXAMPLES) == pytest.approx(1)
        assert adapted.perplexity(DEV) == math.inf


def test_greedy_is_a_loop_over_the_slow_mixture(plm, made, pairs):
    with opened(plm, made, **FIXED) as adapted:
        found = adapted.generate(SOURCES)
    slow = [slow_tokens(plm, pairs, source, FIXED) for source in SOURCES]
    assert found.texts == [
        text_of(plm.tokenizer, tokens, cut=tokens[-1] != plm.tokenizer.eos_token_id) for tokens in slow
    ]
    assert found.tokens == sum(map(len, slow))


def test_a_text_does_not_depend_on_its_batch(plm, made):
    sources = [*SOURCES, "the small dog is in the house and the house is here", "a"]
    with opened(plm, made, **FIXED) as adapted:
        assert adapted.generate(sources, batch_size=1) == adapted.generate(sources, batch_size=7)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
def test_beams_and_samples_are_those_of_the_slow_mixture(plm, made, index, pairs, settings):
    def slow(ids, scores):
        rows = []
        for row in ids.tolist():
            context = row[row.index(plm.tokenizer.bos_token_id) :]
            rows.append(torch.from_numpy(slow_p(plm, pairs, context, **FIXED)).log().float())
        return torch.stack(rows)

    def texts(**more):
        torch.manual_seed(4)
        return decode(plm, plm.model, SOURCES[:3], TASK, plain, **settings, **more).texts

    slowly = texts(logits_processor=[slow])
    with plugged(plm.model, index, MixtureSettings(**FIXED)):
        assert texts() == slowly
    assert texts() != slowly


@pytest.mark.parametrize("family", ["opt-projected", "gpt2", "gemma2", "cohere", "granite"])
def test_only_the_last_position_is_mixed_whatever_the_model_does_to_its_logits(family, tmp_path):
    model = build_model(family)
    plm = LocalPLM(model, build_tokenizer(), name=family)
    made = folders(plm, tmp_path, KNN(dtype="float32"), job())
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        with plugged(model, Index.load(made[1] / INDEX, plm.description), MixtureSettings(5, 2.0, 0.7)):
            found, as_tuple = model(ids).logits, model(ids, return_dict=False)[0]
        after = model(ids).logits
    assert torch.equal(found, as_tuple)
    assert torch.equal(found[:, :-1], before[:, :-1])
    assert torch.equal(after, before)
    pairs = pairs_of(made[0] / MEMORY)
    # A context is what stands in front of a token, so one more token asks for that of all six.
    representations = {r.index: r for r in plm.represent([[*row, 5] for row in ids.tolist()], [6, 6])}
    for row in range(2):
        f = plm.head().normalise(representations[row].representations)[0]
        p_plm = torch.softmax(before[row, -1].double(), -1).numpy()
        slow = 0.7 * slow_p_knn(pairs, f, 5, 2.0, len(p_plm)) + 0.3 * p_plm
        assert np.allclose(found[row, -1].exp().numpy(), slow, atol=1e-5)


def test_the_model_is_restored_even_after_an_error(plm, made, index):
    def parts():
        return [
            (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in plm.model.named_modules()
        ]

    before, weights = parts(), {name: tensor.clone() for name, tensor in plm.model.state_dict().items()}
    with opened(plm, made, **FIXED) as adapted:
        adapted.generate(SOURCES)
        assert parts() == before
    with pytest.raises(IndexError), plugged(plm.model, index, MixtureSettings(**FIXED)):
        plm.model(torch.tensor([[10**6]]))
    assert parts() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plm.model.state_dict().items())


def slow_log_likelihood(plm, pairs, k, temperature, weight):
    memory = memory_of(plm, TASK, DEV)
    (batch,) = memory.view().batches(10_000)
    p_plm = torch.softmax(memory.head().logits(batch.representations), -1).double()
    total = 0.0
    for f, y, row in zip(batch.representations, batch.targets.tolist(), p_plm, strict=True):
        p = slow_p_knn(pairs, f, k, temperature, len(row))[y]
        total += math.log(weight * p + (1 - weight) * float(row[y]))
    return total / len(batch.targets)


def test_perplexity_is_that_of_a_slow_loop(plm, made, pairs):
    with opened(plm, made, **FIXED) as adapted:
        assert adapted.perplexity(DEV) == pytest.approx(math.exp(-slow_log_likelihood(plm, pairs, **FIXED)), rel=1e-5)


def test_what_is_chosen_makes_dev_likeliest(plm, made, index):
    with opened(plm, made) as adapted:
        chosen = dict(adapted.chosen)
        best = math.log(adapted.perplexity(DEV))
    assert chosen["k"] in KS
    assert 0 < chosen["weight"] < 1
    measured = measure(plm, job(), DEV, index, max(k for k in KS if k <= len(index)))
    mean = float(measured.neighbours.distances.mean())
    assert min(abs(chosen["temperature"] / mean / share - 1) for share in SHARES) < 1e-5
    for k, share, weight in itertools.product(KS, SHARES, np.linspace(0, 1, 21)):
        if k <= len(index):
            found = log_p_mixed(replace_k(measured, k), MixtureSettings(k, share * mean, float(weight)))
            assert -float(found.double().mean()) >= best - 1e-5


def replace_k(measured, k):
    near = Neighbours(measured.neighbours.distances[:, :k], measured.neighbours.targets[:, :k])
    return replace(measured, neighbours=near)


def test_a_few_of_the_grid_against_the_slow_loop(plm, index, pairs):
    measured = measure(plm, job(), DEV, index, 16)
    found = knn_mixture.log_p_knn(measured, [1, 4, 16], [0.5, 8.0])
    for (i, temperature), (j, k) in itertools.product(enumerate([0.5, 8.0]), enumerate([1, 4, 16])):
        mean = float(torch.logaddexp(found[i, j] + math.log(0.4), measured.log_p_plm.double() + math.log(0.6)).mean())
        assert mean == pytest.approx(slow_log_likelihood(plm, pairs, k, temperature, 0.4), rel=1e-5)


@pytest.mark.parametrize("name", ["k", "temperature", "weight"])
def test_what_is_given_is_kept_and_the_rest_chosen(plm, made, name):
    with opened(plm, made, **{name: FIXED[name]}) as adapted:
        assert adapted.chosen[name] == FIXED[name]
        assert adapted.chosen.keys() == FIXED.keys()


def test_where_all_settings_are_given_no_dev_examples_are_needed(plm, made):
    with opened(plm, made, job(dev=()), **FIXED) as adapted:
        assert adapted.chosen == FIXED
    with pytest.raises(ConfigError, match="chooses k, temperature and weight on dev examples"):
        opened(plm, made, job(dev=()), k=3)


def test_where_every_distance_is_zero_any_temperature_will_do():
    zeros = Neighbours(torch.zeros(2, 1), torch.tensor([[1], [2]]))
    chosen = choose(TokenMeasurements(torch.tensor([-1.0, -2.0]), zeros, torch.tensor([1, 3])), [1], None, None)
    assert chosen.temperature > 0
    assert 0 < chosen.weight < 1


def test_predicted_contexts(plm, tmp_path):
    method = KNN.of({"contexts": "predicted", "targets": "aligned"})
    assert not method.needs.targets_at_owner
    prepared, trained, _ = folders(plm, tmp_path, method, job())
    with method.open(plm, job(), prepared, trained) as adapted:
        assert len(adapted.generate(SOURCES).texts) == 5


def test_training_reports_no_parameters_and_keeps_index_and_targets(plm, made, pairs):
    _, trained, figures = made
    assert figures.trainable_parameters == 0
    assert figures.seconds > 0
    with opened(plm, made, **FIXED) as adapted:
        assert adapted.disk_bytes == size(trained / INDEX)
        assert adapted.disk_bytes > len(pairs) * 4 * (plm.description.d + 1)
    assert {path.name for path in (trained / INDEX).iterdir()} == {FILE, VECTORS, TARGETS}


def test_the_memory_is_shared_with_pema_and_the_index_by_all_mixtures():
    assert KNN().prepared_by == PEMA().prepared_by
    assert (
        KNN.of(FIXED).trained_by
        == KNN().trained_by
        == {
            "contexts": "teacher",
            "targets": "position",
            "dtype": "float16",
            "index": "Flat",
        }
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "knn-lm: k=0 is too small: it must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 is too small: it must be more than 0"),
        ({"temperature": math.inf}, "temperature=inf must be finite"),
        ({"weight": 1.5}, "weight=1.5 is too large: it must be at most 1"),
        ({"targets": "aligned"}, "targets='aligned' requires contexts='predicted'"),
        ({"lambda": 0.5}, "unknown setting 'lambda' of knn-lm"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        KNN.of(settings)


@pytest.mark.parametrize("factory", ["Flatt", "IVF4096,Flat", "PQ7"])
def test_an_index_that_does_not_fit_is_refused(made, tmp_path, factory):
    with pytest.raises(ConfigError, match=rf"index='{factory}' does not fit .* representations of 32 values"):
        KNN(index=factory).train(job(), made[0], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied(index, tmp_path):
    index.save(tmp_path / INDEX)
    return tmp_path / INDEX


def test_an_index_of_another_plm_is_refused(copied):
    other = LocalPLM(build_model(seed=1), build_tokenizer(), name="other")
    with pytest.raises(MismatchError, match=r"the kNN-LM index .* belongs to another PLM"):
        Index.load(copied, other.description)


@pytest.mark.parametrize("name", [VECTORS, TARGETS])
def test_a_damaged_or_missing_file_is_refused(plm, copied, name):
    data = bytearray((copied / name).read_bytes())
    data[-3] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(ExternalMemoryError, match=f"{name} is damaged"):
        Index.load(copied, plm.description)
    (copied / name).unlink()
    with pytest.raises(ExternalMemoryError, match=f"{name} is missing"):
        Index.load(copied, plm.description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(pairs=3), "its digest does not match"),
        (lambda values: values.pop("digest"), "its digest does not match"),
        (lambda values: values.update(version=9), "version 9, but this pema reads 'pema-knn' version 1"),
        (lambda values: values.update(format="other"), "has format 'other'"),
    ],
)
def test_a_description_that_was_changed_is_refused(plm, copied, change, message):
    values = json.loads((copied / FILE).read_text())
    change(values)
    (copied / FILE).write_text(json.dumps(values))
    with pytest.raises(ExternalMemoryError, match=message):
        Index.load(copied, plm.description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values, targets: values.update(pairs=3), "it does not contain 3 pairs"),
        (lambda values, targets: values.update(pairs="3"), "pairs='3' must be a whole number"),
        (lambda values, targets: values.update(files=[]), "it must list the files"),
        (lambda values, targets: values["files"][0].update(file="../outside"), "it must list the files"),
        (lambda values, targets: values["plm"].update(d=0), "plm.d=0 is too small"),
        (lambda values, targets: targets.fill_(10**6), "its pairs are not those of"),
        (lambda values, targets: targets.fill_(-1), "its pairs are not those of"),
        (lambda values, targets: targets.long(), "it does not contain"),
        (lambda values, targets: targets[:-1], "it does not contain"),
    ],
)
def test_an_index_with_impossible_contents_is_refused(plm, copied, change, message):
    """Whoever can write the files can sign them."""
    values = json.loads((copied / FILE).read_text())
    targets = load_file(copied / TARGETS)["targets"].clone()
    made = change(values, targets)
    (copied / TARGETS).unlink()
    save_file({"targets": targets if made is None else made}, copied / TARGETS)
    for entry in values["files"]:
        if entry["file"] == TARGETS:
            entry.update(bytes=(copied / TARGETS).stat().st_size, sha256=sha256(copied / TARGETS))
    values.pop("digest")
    (copied / FILE).write_text(json.dumps(values | {"digest": digest(values)}))
    with pytest.raises(ExternalMemoryError, match=message):
        Index.load(copied, plm.description)


def test_a_folder_without_an_index_is_refused(plm, tmp_path):
    with pytest.raises(ExternalMemoryError, match="has no readable kNN-LM index"):
        Index.load(tmp_path, plm.description)


def test_a_full_disk_leaves_nothing(index, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        index.save(tmp_path / INDEX)
    assert not list(tmp_path.iterdir())


def test_a_missing_faiss_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'faiss-cpu>="):
        KNN().train(job(), made[0], tmp_path)
