"""Contexts of a local PLM against a loop that runs one example at a time, for every family."""

import logging
import os
from pathlib import Path

import pytest
import torch

from pema.errors import CapacityError, ConfigError, DataError
from pema.owner.batching import common_prefix, length_batches, pad_left, pad_right
from pema.owner.derivation import find_final_norm
from pema.owner.local import LocalPLM, growing, running
from pema.owner.local import plm as local
from pema.owner.local.prefix import Prefix
from tiny import EOS, FAMILIES, PAD

PREFIX = [1, 5, 6, 7, 8]


def examples(shared=PREFIX):
    """Sequences of several lengths that begin with `shared`, and where their targets start; pad and eos among them."""
    generator = torch.Generator().manual_seed(0)
    sequences = [shared + torch.randint(3, 320, (n,), generator=generator).tolist() for n in (3, 9, 14, 2, 20, 9)]
    sequences[1][7], sequences[2][-1], sequences[4][9] = PAD, EOS, EOS
    starts = [len(shared) + n for n in (1, 3, 1, 1, 10, 2)]
    return sequences, starts


def slow_row(plm, context):
    """f(context), (d_tap,), and the model's own logits, from one plain forward pass."""
    module = plm.model.get_output_embeddings() if plm.tap == "head_input" else find_final_norm(plm.model).module
    seen = []
    handle = module.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0][0]))
    with torch.no_grad():
        logits = plm.model(input_ids=torch.tensor([context]), use_cache=False).logits
    handle.remove()
    return seen[0], logits[0, -1]


def slow_teacher(plm, sequence, start):
    return slow_row(plm, sequence)[0][start - 1 : -1]


def slow_greedy(plm, prompt, steps):
    context, rows = list(prompt), []
    for _ in range(steps):
        f, logits = slow_row(plm, context)
        rows.append(f[-1])
        context.append(int(logits.argmax()))
        if context[-1] in plm.description.eos_token_ids:
            break
    return torch.stack(rows), context[len(prompt) :]


def check_teacher(plm, sequences, starts, batch_tokens=64):
    found = list(plm.represent(sequences, starts, batch_tokens=batch_tokens))
    assert sorted(r.index for r in found) == list(range(len(sequences)))
    for r in found:
        truth = slow_teacher(plm, sequences[r.index], starts[r.index])
        assert r.generated is None
        assert r.representations.device.type == "cpu"
        torch.testing.assert_close(r.representations, truth, atol=1e-4, rtol=1e-4)


def check_greedy(plm, prompts, steps, batch_tokens=200):
    found = list(plm.predict(prompts, steps, batch_tokens=batch_tokens))
    assert sorted(r.index for r in found) == list(range(len(prompts)))
    for r in found:
        truth, words = slow_greedy(plm, prompts[r.index], steps[r.index])
        assert r.generated.tolist() == words
        assert r.generated.dtype == torch.int64
        torch.testing.assert_close(r.representations, truth, atol=1e-4, rtol=1e-4)


STEPS = [5, 9, 14, 2, 7, 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_equal_a_loop_over_single_examples(tiny_plm, family, caplog):
    plm = tiny_plm(family)
    sequences, starts = examples()
    with caplog.at_level(logging.WARNING, "pema"):
        check_teacher(plm, sequences, starts)
        check_greedy(plm, [s[:b] for s, b in zip(sequences, starts, strict=True)], STEPS)
    # Every family takes every short cut, but for the one whose state is not keys and values.
    assert any(r.name.startswith("pema") for r in caplog.records) == (family == "mamba")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "bloom", "opt", "opt-projected", "mamba"])
def test_contexts_at_the_norms_input(tiny_plm, family):
    plm = tiny_plm(family, tap="norm_input")
    sequences, starts = examples()
    check_teacher(plm, sequences, starts)
    check_greedy(plm, [s[:b] for s, b in zip(sequences, starts, strict=True)], STEPS)
    assert plm.description.d_tap == 32


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba"])
def test_what_is_skipped_does_not_change_the_other_answers(tiny_plm, family):
    plm, (sequences, starts) = tiny_plm(family), examples()
    prompts, steps = [s[:n] for s, n in zip(sequences, starts, strict=True)], [4, 2, 3, 4, 1, 2]
    for call, arguments in ((plm.represent, (sequences, starts)), (plm.predict, (prompts, steps))):
        every = {answer.index: answer for answer in call(*arguments, batch_tokens=64)}
        for skip in ({0}, {4, 2}, {0, 1, 2, 4, 5}, set(range(6))):
            rest = {answer.index: answer for answer in call(*arguments, batch_tokens=64, skip=frozenset(skip))}
            assert rest.keys() == every.keys() - skip
            for i, answer in rest.items():
                assert answer.representations.equal(every[i].representations)


@pytest.fixture(
    params=[torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail] not enough memory: 1 GB")]
)
def small_device(monkeypatch, request):
    """A device with memory for a number of rows at a time; returns a function that sets it, and the rows of calls."""
    calls, most = [], []
    teacher, greedy = running.Runner.teacher, local.greedy

    def limited(rows):
        calls.append(rows)
        if rows > most[-1]:
            raise request.param

    def teacher_limited(runner, rows, *rest):
        limited(len(rows))
        return teacher(runner, rows, *rest)

    def greedy_limited(contexts, limits, eos):
        limited(len(limits))
        return greedy(contexts, limits, eos)

    def start(rows):
        monkeypatch.setattr(running.Runner, "teacher", teacher_limited)
        monkeypatch.setattr(local, "greedy", greedy_limited)
        most.append(rows)
        return calls

    return start


def test_batches_are_halved_until_they_fit_the_device(tiny_plm, small_device, capsys):
    plm, (sequences, starts) = tiny_plm(), examples()
    prompts = [s[:n] for s, n in zip(sequences, starts, strict=True)]
    check_teacher(plm, sequences, starts)
    check_greedy(plm, prompts, STEPS)  # the shortcuts are chosen
    for check, given in ((check_teacher, (sequences, starts)), (check_greedy, (prompts, STEPS))):
        plm._fitting = local.Fitting()
        calls = small_device(2)
        calls.clear()
        check(plm, *given, batch_tokens=1000)
        assert calls[0] == 6
        assert sum(rows for rows in calls if rows <= 2) == len(sequences)
        calls.clear()
        check(plm, *given, batch_tokens=1000)
        assert max(calls) <= 2
    assert "no memory for a batch of" in capsys.readouterr().err


def test_a_context_for_which_the_device_has_no_memory(tiny_plm, small_device):
    plm, (sequences, starts) = tiny_plm(), examples()
    list(plm.represent(sequences, starts))
    small_device(0)
    with pytest.raises(CapacityError, match=r"no memory for a context of \d+ tokens\. Use shorter examples, .* memory"):
        list(plm.represent(sequences, starts))


def test_other_errors_of_a_batch_are_not_taken_for_a_lack_of_memory(tiny_plm, monkeypatch):
    plm, (sequences, starts) = tiny_plm(), examples()
    list(plm.represent(sequences, starts))
    calls = []

    def broken(_runner, rows, *_rest):
        calls.append(len(rows))
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(running.Runner, "teacher", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(plm.represent(sequences, starts))
    assert calls == [6]


def test_batches_are_larger_on_an_accelerator(tiny_plm, monkeypatch):
    plm = tiny_plm()
    assert plm.batch_tokens == 8192
    monkeypatch.setattr(local, "is_asynchronous", lambda device: True)
    assert plm.batch_tokens == 65536


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "opt"])
@pytest.mark.parametrize("shared", [[9], [], [9, 8, 7, 6], list(range(3, 23))])
def test_prefixes_of_every_length(tiny_plm, family, shared):
    plm = tiny_plm(family)
    sequences, starts = examples(shared)
    check_teacher(plm, sequences, starts)
    check_greedy(plm, [s[:b] for s, b in zip(sequences, starts, strict=True)], STEPS)


def test_prompts_that_are_equal_and_prompts_that_are_prefixes_of_others(tiny_plm):
    plm = tiny_plm()
    check_greedy(plm, [[5, 6, 7], [5, 6, 7], [5, 6], [5, 6, 7, 8, 9, 10, 11, 12]], [4, 2, 6, 3])
    check_teacher(plm, [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6]], [1, 3, 1])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_representations_do_not_depend_on_the_batch(tiny_plm, family):
    plm = tiny_plm(family)
    sequences, starts = examples()
    prompts = [s[:b] for s, b in zip(sequences, starts, strict=True)]
    for run in (
        lambda n: plm.represent(sequences, starts, batch_tokens=n),
        lambda n: plm.predict(prompts, STEPS, batch_tokens=n),
    ):
        alone, together = ({r.index: r for r in run(n)} for n in (1, 10_000))
        for i in alone:
            torch.testing.assert_close(alone[i].representations, together[i].representations, atol=1e-5, rtol=1e-5)
            assert (alone[i].generated is None) or torch.equal(alone[i].generated, together[i].generated)


def test_generation_stops_after_the_first_end_of_sequence(tiny_plm):
    plm = tiny_plm()
    prompts = [[1, n] for n in range(3, 43)]
    words = [slow_greedy(plm, prompt, 12)[1] for prompt in prompts]
    # A token that the model chooses often, taken as the end, so that rows finish at different steps.
    chosen = [w for row in words for w in row]
    plm.model.generation_config.eos_token_id = max(sorted(set(chosen)), key=chosen.count)
    plm = LocalPLM(plm.model, plm.tokenizer)
    end = plm.model.generation_config.eos_token_id
    assert plm.description.eos_token_ids == tuple(sorted({end, EOS}))
    found = {r.index: r.generated.tolist() for r in plm.predict(prompts, [12] * 40)}
    stopped = [words for words in found.values() if end in words]
    assert len(stopped) > 3
    assert all(words.index(end) == len(words) - 1 for words in stopped)
    assert len({len(words) for words in stopped}) > 1
    check_greedy(plm, prompts, [12] * 40, batch_tokens=8192)


def test_greedy_tokens_are_those_of_the_models_own_generate(tiny_plm):
    plm = tiny_plm("gemma2")
    prompt = [1, 5, 6, 7]
    own = plm.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10)[0, len(prompt) :].tolist()
    assert next(plm.predict([prompt], [10])).generated.tolist() == own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_representations(tiny_plm, dtype):
    plm = tiny_plm(dtype=dtype)
    sequences, starts = examples()
    for r in plm.represent(sequences, starts):
        assert r.representations.dtype == dtype
        truth = slow_teacher(plm, sequences[r.index], starts[r.index])
        torch.testing.assert_close(r.representations.float(), truth.float(), atol=0.1, rtol=0.1)
    for r in plm.predict([[1, 5], [1, 6, 7]], [3, 4]):
        assert r.representations.dtype == dtype


@pytest.mark.parametrize("contexts", ["teacher", "predicted"])
def test_the_lm_head_multiplies_no_row_that_is_not_needed(tiny_plm, contexts):
    plm = tiny_plm()
    sequences, starts = examples()
    list(plm.represent(sequences, starts)), list(plm.predict(sequences, STEPS))
    rows = []
    handle = plm.model.lm_head.register_forward_hook(lambda _m, a, _o: rows.append(a[0].flatten(0, -2).shape[0]))
    if contexts == "teacher":
        list(plm.represent(sequences, starts))
        assert sum(rows) == 0
    else:
        found = list(plm.predict(sequences, [3] * 6))
        assert max(rows) <= 6
        assert sum(rows) <= sum(len(r.generated) for r in found) + 6
    handle.remove()


def test_the_shared_prefix_runs_once(tiny_plm):
    plm = tiny_plm()
    sequences, starts = examples()
    list(plm.represent(sequences, starts))
    shapes = []
    handle = plm.model.model.register_forward_pre_hook(
        lambda _m, _a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    list(plm.represent(sequences, starts))
    handle.remove()
    assert shapes == [(1, 5), (6, 19)]  # the last token is a target only


def test_a_prefix_is_shared_where_it_pays():
    long, short = [[0] * 100] * 4, [[0] * 30] * 4
    assert local.pays(10, short)
    assert not local.pays(10, long)
    assert not local.pays(3, [[0] * 8] * 4)
    assert not local.pays(10, short[:1])


def test_no_hook_is_left_between_batches(tiny_plm):
    plm = tiny_plm()
    sequences, starts = examples()
    results = plm.represent(sequences, starts, batch_tokens=1)
    next(results)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plm.model.modules())


def test_a_short_cut_that_computes_something_else_is_not_used(tiny_plm, monkeypatch, caplog):
    def wrong(self, rows):
        cache = self._copy()
        for layer in cache.layers:
            layer.keys = layer.keys.flip(-1).expand(rows, -1, -1, -1)
            layer.values = layer.values.flip(-1).expand(rows, -1, -1, -1)
        return cache

    monkeypatch.setattr(Prefix, "expanded", wrong)
    plm = tiny_plm()
    with caplog.at_level(logging.WARNING, "pema"):
        check_teacher(plm, *examples())
    assert "LlamaForCausalLM: the shared prefix is not used, it changes representations" in caplog.text


def test_a_cache_that_cannot_be_used_is_done_without(tiny_plm, monkeypatch, caplog):
    def broken(cache, keep):
        raise RuntimeError("no rows here")

    monkeypatch.setattr(growing, "_select_rows", broken)
    plm = tiny_plm()
    with caplog.at_level(logging.WARNING, "pema"):
        check_greedy(plm, [[1, 5, 6], [1, 7]], [3, 6])
    assert "the key-value cache is not used: no rows here" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.04 GB)"),
        OSError(28, "No space left on device"),
        ConfigError("an adapter is attached"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:12]}",
)
@pytest.mark.parametrize("place", ["_select_rows", "pad_left"])
def test_a_passing_error_while_short_cuts_are_tried_is_not_remembered(tiny_plm, monkeypatch, caplog, error, place):
    def short(*_):
        raise error

    plm = tiny_plm()
    prompts, steps = [[1, 5, 6], [1, 7]], [3, 6]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "pema"):
        patch.setattr(growing, place, short)
        with pytest.raises(type(error)):
            list(plm.predict(prompts, steps))
    assert not caplog.records
    passes = []
    handle = plm.model.register_forward_pre_hook(lambda _m, _a, k: passes.append(k["use_cache"]), with_kwargs=True)
    check_greedy(plm, prompts, steps)
    passes.clear()
    list(plm.predict(prompts, steps))
    handle.remove()
    assert passes == [True] * 6


def test_padding_that_is_looked_at_is_not_used(tiny_plm, monkeypatch, caplog):
    for module in (running, growing):
        monkeypatch.setattr(module, "pad_right", lambda rows: pad_right(rows).roll(int(len(rows) > 1), 1))
    plm = tiny_plm()
    with caplog.at_level(logging.WARNING, "pema"):
        check_teacher(plm, *examples())
        check_greedy(plm, [[1, 5, 6], [1, 7]], [3, 6])
    assert "LlamaForCausalLM: padding is not used" in caplog.text


def test_nothing_in_nothing_out(tiny_plm):
    plm = tiny_plm()
    assert list(plm.represent([], [])) == []
    assert list(plm.predict([], [])) == []


@pytest.mark.parametrize(
    ("sequences", "starts", "match"),
    [
        ([[1, 2], [1] * 129], [1, 5], "sequence 1 has 129 tokens, the PLM's context window holds 128"),
        ([[1, 2], [1, 2]], [1, 2], "sequence 1 has 2 tokens and its target starts at 2"),
        ([[1, 2]], [0], "sequence 0 has 2 tokens and its target starts at 0"),
        ([[]], [0], "sequence 0 has 0 tokens"),
    ],
)
def test_sequences_that_cannot_be_represented(tiny_plm, sequences, starts, match):
    with pytest.raises(DataError, match=match):
        tiny_plm().represent(sequences, starts)


@pytest.mark.parametrize(
    ("prompts", "steps", "match"),
    [
        ([[1], []], [1, 1], "prompt 1 is empty"),
        ([[1] * 100], [29], "prompt 0 has 100 tokens and 29 steps, the PLM's context window holds 128"),
        ([[1, 2]], [0], "prompt 0 has 0 steps"),
    ],
)
def test_prompts_that_cannot_be_continued(tiny_plm, prompts, steps, match):
    with pytest.raises(DataError, match=match):
        tiny_plm().predict(prompts, steps)


def test_the_whole_context_window_can_be_used(tiny_plm):
    plm = tiny_plm("opt")
    sequence = [1] + [5] * 127
    check_teacher(plm, [sequence], [100])
    check_greedy(plm, [sequence[:126]], [2])


def test_batches_are_of_nearly_equal_length_and_within_the_budget():
    lengths = [3, 17, 5, 5, 40, 9, 9, 9, 1]
    batches = list(length_batches(lengths, 20))
    assert sorted(i for b in batches for i in b) == list(range(9))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)
    flat = [lengths[i] for b in batches for i in b]
    assert flat == sorted(lengths, reverse=True)


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]], 10) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]], 2) == 2
    assert common_prefix([[1, 2, 3]], 9) == 3
    assert common_prefix([[1], [2]], 9) == 0
    assert common_prefix([[], [2]], 9) == 0
    assert common_prefix([], 9) == 0
    assert common_prefix([[1, 2]], 0) == 0


def test_padding():
    assert pad_right([[1, 2], [3]]).tolist() == [[1, 2], [3, 3]]
    tokens, mask = pad_left([[1, 2], [3]], 3)
    assert tokens.tolist() == [[1, 1, 2], [3, 3, 3]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1]]


@pytest.mark.skipif(not Path(os.environ.get("PEMA_PLM", "")).joinpath("config.json").is_file(), reason="PEMA_PLM unset")
def test_a_real_plm_against_the_slow_loop():
    plm = LocalPLM.load(os.environ["PEMA_PLM"], dtype="float32")
    texts = ["The house is small.", "I am tired and I would like to go home now.", "Why?"]
    prompts = [plm.tokenizer(f"Translate this from English to German: \n{text}\nGerman:").input_ids for text in texts]
    check_greedy(plm, prompts, [12, 20, 5])
    check_teacher(plm, [p + p[2:] for p in prompts], [len(p) for p in prompts])
