"""The benchmarks at toy size: what they report, and that what they measure against is rendered right."""

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.loss import CrossEntropy, JointLoss
from pema.adapter.module import Adapter
from pema.adapter.reconstruction import closed_form, reconstruction_error
from pema.owner.head import Head
from pema.owner.local import plm as local
from reproduction.benchmarks import __main__ as main
from reproduction.benchmarks import (
    building,
    generation,
    joint_training,
    prefix,
    process,
    published,
    reconstruction,
    timing,
)
from reproduction.benchmarks.__main__ import memory_table_of, name_of, table_of
from reproduction.benchmarks.inputs import open_plm, plm_memory, random_adapter, rows_of, synthetic_memory
from reproduction.benchmarks.options import ON_ACCELERATOR, Options, Shape
from reproduction.paper_shape.options import SHAPES
from reproduction.paper_shape.options import Shape as PLMShape
from reproduction.tables import benchmarks as tables


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("plm")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Options(
        plm=str(folder),
        corpus="none",
        examples=6,
        words=4,
        threads=1,
        repeats=1,
        shapes=(Shape("toy", 16, 48),),
        pairs=300,
        published_steps=3,
        published_batch=128,
        sgd_epochs=2,
        ranks=(0,),
        new_tokens=3,
        batch_sizes=(1, 2),
        serve_seconds=0.2,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("inputs")
    plm_memory(options, folder)
    synthetic_memory(options, options.shapes[0], folder)
    return folder


@pytest.fixture(scope="module")
def results(options, folder):
    threads = torch.get_num_threads()
    try:
        return {name: json.loads(json.dumps(process.measure(name, options, folder))) for name in process.NAMES}
    finally:
        torch.set_num_threads(threads)


def test_every_benchmark_says_what_was_measured_where_and_how(results, options):
    for name, result in results.items():
        assert result["benchmark"] == name
        assert result["threads"]["torch"] == 1
        assert result["signature"]["config"]["benchmark"] == name
        assert result["signature"]["config"]["plm"] == Path(options.plm).name
        assert result["signature"]["versions"]["torch"] == version("torch")
        assert result["signature"]["machine"]["cores"]
        for line in result["summary"]:
            assert line["value"] > 0
            assert line["ratio"] > 0
            assert line["met"] in ((None,) if not line["aim"] else (True, False))


def test_building_is_measured_against_the_calls_it_makes(results, options, folder):
    result = results["building"]
    forwards, builds = ["forward, replayed", "forward, unshared"], ["build_memory", "build_memory, unshared"]
    assert set(result["measured"]) == {*forwards, "represent", *builds}
    assert [line["against"] for line in result["summary"]] == [forwards[0], forwards[0], forwards[1], forwards[1]]
    assert all(variant["tokens_per_second"] > 0 for variant in result["measured"].values())
    assert result["measured"]["represent"]["repeats"] == options.repeats
    # One call for the shared instruction, then one per batch.
    assert len(result["calls"]) == 2
    assert result["calls"][0][0] == 1
    assert result["calls"][1][0] == options.examples
    shares = result["where_it_goes"]["represent, profiled"]["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)


def test_a_prefix_is_encoded_once_or_for_every_text(options, monkeypatch):
    monkeypatch.setattr(local, "_LEAST_SAVED", 1)
    case = prefix.PrefixCase(replace(options, new_tokens=2))
    assert len(case.texts) == 2
    case.generate(), case.score()
    shapes = []
    case.plm.model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: shapes.append(args[0].shape))
    for run in (case.generate, case.score):
        shapes.clear()
        run()
        assert shapes[0][0] == 1
        shared = sum(rows * columns for rows, columns in shapes)
        shapes.clear()
        with building.unshared():
            run()
        assert shapes[0][0] == 2
        assert sum(rows * columns for rows, columns in shapes) > shared


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_replaying_a_call_gives_what_the_build_saw(family, options, tmp_path, tiny_model, tiny_tokenizer):
    tiny_model(family).save_pretrained(tmp_path / "plm")
    tiny_tokenizer().save_pretrained(tmp_path / "plm")
    one = building.BuildingCase(replace(options, plm=str(tmp_path / "plm")), tmp_path)
    one.represent()
    seen = []
    handle = one.base.register_forward_hook(lambda _module, _args, output: seen.append(output.last_hidden_state))
    calls = one.recorded()
    first = list(seen)
    assert len(first) == len(calls) == 2
    for _ in range(2):
        seen.clear()
        one.replay(calls)
        assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
    handle.remove()


def test_reconstruction_compares_errors_on_the_same_held_out_pairs(results):
    (found,) = results["reconstruction"]["ranks"]
    assert found["rank"] == 8
    assert found["closed_form"]["median_seconds"] > 0
    assert set(found["gradient_descent"]) == set(published.PROCEDURES)
    for learnt in found["gradient_descent"].values():
        assert found["closed_form"]["held_out_error"] < learnt["held_out_error"]
        assert learnt["speed_up"] >= learnt["speed_up_to_its_best"] > 0
        assert learnt["stopped"] == "after 2 epochs"


def test_joint_training_reports_both_presets_and_the_published_loop(results):
    (found,) = results["joint_training"]["shapes"]
    assert (found["d"], found["V"], found["pairs"]) == (16, 48, 304)
    paper, residual = found["presets"]["paper"], found["presets"]["residual"]
    assert set(paper["measured"]) == {"pema", "bare products", "published loop"}
    assert set(residual["measured"]) == {"pema", "bare products"}
    assert paper["published_pairs"] == 304
    assert paper["rank"] == 16
    for preset in (paper, residual):
        assert preset["measured"]["pema"]["pairs_per_second"] > 0
        assert "bare products" in preset["where_it_goes"]["seconds of a pass, each alone"]


def test_serving_reports_load_bytes_and_memory(results):
    found = results["serving"]
    assert [one["clients"] for one in found["load"]] == [1, 4, 16]
    assert all(0 < one["p50_ms"] <= one["p99_ms"] for one in found["load"])
    assert found["building"]["bytes_received"] > found["building"]["bytes_sent"] > 0
    for one in found["generation"]:
        assert one["bytes_per_token_down"] >= 2 * found["d"]
    assert found["sessions"]["bytes"] > 0


def test_generation_reports_every_batch_size_with_and_without(results, options):
    assert [found["batch_size"] for found in results["generation"]["batches"]] == list(options.batch_sizes)
    for found in results["generation"]["batches"]:
        assert set(found["seconds_per_step"]) == {"without", "paper", "residual", "best"}
        assert set(found["ratio"]) == {"paper", "residual", "best"}


def test_generation_makes_exactly_as_many_tokens_as_asked_for(options):
    from pema.owner.local import LocalPLM

    plm = LocalPLM.load(options.plm)
    generating = generation.GenerationCase(plm, options, 2)
    columns = generating.ids.shape[1]
    assert generating.generate().shape == (2, columns + options.new_tokens)
    adapter = random_adapter("residual", plm.description.d, plm.description.vocabulary_size)
    assert generating.with_adapter(adapter).shape == (2, columns + options.new_tokens)


def test_every_part_runs_alone(options, folder):
    for module in (reconstruction, joint_training):
        for run in module.parts(options, folder).values():
            run()
    assert list(building.parts(options, folder)) == ["represent", "build_memory", "forward, unshared"]
    assert list(generation.parts(options, folder)) == [
        "without, batch 2",
        "preset paper, batch 2",
        "preset residual, batch 2",
        "preset best, batch 2",
    ]


def test_the_tables_show_every_line(results):
    found = [result | {"peak_memory": {"parts_bytes": {"a part": 5_000_000}}} for result in results.values()]
    assert table_of(found).row_count == sum(len(result["summary"]) for result in found)
    assert memory_table_of(found).row_count == len(found)


def test_the_published_loss_is_pemas():
    d, r, V, n, kappa = 12, 5, 30, 9, 0.2
    draw = torch.Generator().manual_seed(0)
    f, targets = torch.randn(n, d, generator=draw), torch.randint(0, V, (n,), generator=draw)
    W_hd, B_rct = torch.randn(V, d, generator=draw), torch.randn(d, r, generator=draw)
    theirs = published.PublishedAdapter(d, r, dropout=0.0)
    torch.nn.init.normal_(theirs.B, generator=draw)
    ours = Adapter(AdapterConfig(d=d, vocabulary_size=V, rank=r))
    # The published layer divides by r behind A; pema's A is that quotient.
    ours.A.data.copy_(theirs.A.data / r)
    ours.B_pd.data.copy_(theirs.B.data)
    ours.B_rct = B_rct
    their_loss = published.joint_loss(theirs, B_rct, W_hd, f, targets, kappa)
    our_loss = JointLoss(CrossEntropy(Head(W_hd)), kappa)(ours, f, targets).total
    their_loss.backward()
    our_loss.backward()
    torch.testing.assert_close(our_loss, their_loss)
    torch.testing.assert_close(ours.B_pd.grad, theirs.B.grad)
    torch.testing.assert_close(ours.A.grad / r, theirs.A.grad)


def test_the_published_rows_are_those_of_the_memory(options, folder):
    memory = synthetic_memory(options, options.shapes[0], folder)
    loop, pairs = joint_training.published_loop(options, memory, folder)
    rows = published.Rows(folder / "rows-16.f32", folder / "rows-16.i32", memory.d)
    stored = next(memory.view().batches(memory.pairs))
    torch.testing.assert_close(torch.stack([rows[i][0] for i in range(len(rows))]), stored.representations)
    assert torch.equal(torch.stack([rows[i][1] for i in range(len(rows))]), stored.targets)
    assert pairs == len(rows)
    assert loop() < 6


def test_a_plm_of_random_weights_has_the_shape_that_its_name_says(options, monkeypatch):
    monkeypatch.setitem(SHAPES, "toy", PLMShape("toy", 16, 2, 4, 24, V=48))
    one = building.BuildingCase(replace(options, plm="toy"), Path("unused"))
    model = one.plm.model
    assert (one.plm.description.d, one.plm.description.vocabulary_size) == (16, 48)
    assert (model.config.num_hidden_layers, model.config.ffn_dim, model.config.num_attention_heads) == (2, 24, 4)
    one.represent()
    again = open_plm(replace(options, plm="toy"))
    assert again.description.fingerprint == one.plm.description.fingerprint
    shape = SHAPES["opt-1.3b"]  # of its config on the hub
    assert (shape.d, shape.V, shape.layers, shape.ffn, shape.heads) == (2048, 50272, 24, 8192, 32)


def test_another_device_is_measured_at_the_shapes_of_large_plms(tmp_path, monkeypatch, results):
    asked = []

    def child(what, options, _folder, **more):
        asked.append((what, options, more))
        if what in results:
            made = results[what]
            config = options.to_dict() | {"benchmark": what}
            named = {"signature": made["signature"] | {"config": config}, "device": "an accelerator"}
            return {**made, **named, "resident_bytes": 2}
        return {name: ["a part"] for name in process.NAMES} | {"resident_bytes": 1}

    monkeypatch.setattr(main, "child", child)
    given = ["--device", "cuda", "-o", str(tmp_path / "results.jsonl"), "--threads", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *given])
    main.main()
    assert [what for what, _, _ in asked] == ["imports", *process.ON_DEVICE]
    assert {options for _, options, _ in asked} == {replace(ON_ACCELERATOR, device="cuda", threads=2)}
    monkeypatch.setattr(tables, "FILE", tmp_path / "results.jsonl")
    (command,) = tables.commands().values()
    assert command == "python -m reproduction.benchmarks --device cuda --threads 2"


def test_the_bare_products_are_the_gradients_of_the_training_step():
    f, W_hd = torch.randn(8, 6), torch.randn(20, 6)
    products = joint_training.Products(f, W_hd, 4, 8, torch.float32)
    A, B_pd = products.A.clone().requires_grad_(), products.B_pd.clone().requires_grad_()
    products.a_pass()
    logits = f @ A.T @ B_pd.T @ W_hd.T
    logits.backward(logits.detach())
    torch.testing.assert_close(products.dA, A.grad)
    torch.testing.assert_close(products.dB_pd, B_pd.grad)


def test_gradient_descent_learns_and_never_gets_below_the_closed_form(options, folder):
    memory = synthetic_memory(options, options.shapes[0], folder)
    f = rows_of(memory.view())
    how = published.Procedure(32, 0, 3, scaled=False, dropout=0.0, shuffled=True, epochs=30)
    torch.manual_seed(0)
    learnt = published.learn_reconstruction(f, f, 4, how, 300.0)
    A, B_rct, _ = closed_form(memory.view(), 4, memory.d)
    lowest = reconstruction_error(memory.view(), A, B_rct)
    assert lowest <= learnt.held_out_error < 0.7 * float(f.square().mean())
    assert learnt.seconds_to_best <= learnt.seconds


def test_gradient_descent_stops_when_its_time_is_up():
    f = torch.randn(64, 8)
    learnt = published.learn_reconstruction(f, f, 2, published.Procedure(batch_size=16), 0.0)
    assert learnt.stopped == "cut at 0 s"
    assert learnt.steps == 1


def test_options_survive_the_journey_to_another_process(options):
    assert Options.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_timings():
    calls = []
    times = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [2, 2]
    assert timing.timing([3.0, 1.0, 2.0])["median_seconds"] == 2.0
    assert timing.paired_ratio([1.0, 4.0], [2.0, 4.0]) == 0.75
    assert timing.least_ratio([3.0, 2.0], [9.0, 4.0]) == 0.5
    waiting = timing.alternate({"a": lambda: time.sleep(0.2)}, 1, warm_up=0, clock="processor")
    assert waiting["a"][0] < 0.1
    assert timing.row("x", 1.0, "s", "y", 0.9, ">= 0.85")["met"]
    assert not timing.row("x", 1.0, "s", "y", 1.06, "<= 1.05")["met"]
    assert timing.kind_of("aten::addmm") == "matrix products"
    assert timing.kind_of("aten::_softmax") == "softmax and cross-entropy"
    assert timing.kind_of("aten::add") == "other operators"
    assert timing.kind_of("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", timing.KERNELS) == "matrix products"
    assert timing.kind_of("_kernel", timing.KERNELS) == "softmax and cross-entropy"
    assert timing.kind_of("void at::native::vectorized_elementwise_kernel<4>", timing.KERNELS) == "other operators"


def test_a_run_is_named_by_what_is_not_usual():
    def named(**given):
        config = Options().to_dict() | {"benchmark": "building"} | given
        return name_of({"benchmark": "building", "signature": {"config": config}})

    assert named(threads=7) == "building"
    assert named(plm="opt-125m", corpus="multi30k.tsv") == "building, opt-125m, multi30k.tsv"
