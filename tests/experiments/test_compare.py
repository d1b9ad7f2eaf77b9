"""Comparisons and sweeps from end to end on a tiny PLM: runs, skipped runs, and result files."""

import json
import math
import re
import sys
import tomllib
from dataclasses import replace

import pytest
from tests.tiny import build_tokenizer

from pema.cli import main
from pema.errors import AdapterError, MismatchError
from pema.experiments import compare, training_process
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.estimate import START, Sizes, Speed, memory_bytes, prepare_seconds, run_seconds, train_seconds
from pema.experiments.plan import plan_experiment
from pema.experiments.reader import read_folder
from pema.experiments.workplace import Workplace
from pema.files import read_json
from pema.lifeline import child
from pema.methods.registry import get_method
from pema.pages.report.document import report
from pema.tasks.target_statistics import TargetStatistics


def results(folder):
    return {path.stem: read_json(path) for path in (folder / "results" / "tiny").glob("*seed*.json")}


def test_one_result_a_run_and_one_for_a_method_without_seeds(folder, compared):
    found = results(folder)
    assert set(found) == {"alone-seed0", "pema-seed0", "pema-seed1"}
    for name, result in found.items():
        assert result["run"] == name
        assert set(result["scores"]) == {"chrf", "bleu"}
        assert result["signature"]["config"]["data_sha256"]
        assert len((folder / "results" / "tiny" / f"{name}.txt").read_text(encoding="utf-8").splitlines()) == 4


def test_the_grid_is_decided_on_dev_with_the_first_seed(folder, compared):
    result = results(folder)["pema-seed1"]
    tried = {trial["settings"]["learning_rate"]: trial["dev_perplexity"] for trial in result["trials"]}
    assert set(tried) == {1e-6, 3e-2}
    assert tried[3e-2] < tried[1e-6]
    assert result["settings"]["learning_rate"] == 3e-2
    assert result["trials"] == results(folder)["pema-seed0"]["trials"]


def test_costs_are_measured(folder, compared):
    costs = results(folder)["pema-seed0"]["costs"]
    assert costs["trainable_parameters"] == 2 * 16 * 32
    assert costs["train_seconds"] > 0
    assert costs["prepare_seconds"] > 0
    assert costs["seconds_per_token"] > 0
    assert costs["disk_bytes"] > 2 * 16 * 32 * 4
    assert 0 < costs["train_peak_bytes"] < 1e9
    alone = results(folder)["alone-seed0"]
    assert alone["costs"]["trainable_parameters"] == alone["costs"]["disk_bytes"] == 0


def test_the_comparison_is_that_of_the_results(folder, compared):
    _, comparison = compared
    found = results(folder)
    (alone, pema) = comparison.rows
    assert alone.metrics["chrf"].std is None
    mean = (found["pema-seed0"]["scores"]["chrf"]["value"] + found["pema-seed1"]["scores"]["chrf"]["value"]) / 2
    assert pema.metrics["chrf"].mean == pytest.approx(mean)
    (difference,) = [each for each in comparison.differences if each.metric == "chrf"]
    assert difference.difference == pytest.approx(mean - alone.metrics["chrf"].mean)
    assert difference.significant == (difference.p_value < 0.05)


def test_finished_runs_are_skipped_and_the_table_is_the_same(folder, compared, monkeypatch):
    experiment, comparison = compared
    monkeypatch.setattr(compare, "evaluate", None)  # whatever ran would need it
    monkeypatch.setattr(training_process, "train_in_process", None)
    again = run_experiment(experiment, folder / "results", folder / "work")
    assert again.rows == comparison.rows
    assert again.differences == comparison.differences


def test_what_was_trained_is_used_by_another_experiment(folder, compared, monkeypatch):
    monkeypatch.setattr("pema.experiments.workplace.train_in_process", None)
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("lambda_max = 1.0", "lambda_max = 0.5")
    (folder / "half.toml").write_text(text.replace("[1e-6, 3e-2]", "[3e-2]"), encoding="utf-8")
    run_experiment(read_config(folder / "half.toml", "compare"), folder / "results", folder / "work")
    assert (folder / "results" / "half" / "pema-seed1.json").exists()


def test_a_result_of_other_settings_is_refused_by_name(folder, compared):
    changed = (folder / "tiny.toml").read_text(encoding="utf-8").replace("rank = 16", "rank = 8")
    (folder / "changed.toml").write_text('name = "tiny"\n' + changed, encoding="utf-8")
    with pytest.raises(MismatchError, match=r"pema-seed0.json was run with another settings.rank: 16, not 8") as caught:
        run_experiment(read_config(folder / "changed.toml", "compare"), folder / "results", folder / "work")
    assert "The same holds for pema-seed1; another `name` in the file keeps all." in str(caught.value)


def test_all_methods_share_decoding_settings_by_default_from_the_training_targets(folder, compared):
    decodings = [each["signature"]["config"]["decoding"] for each in results(folder).values()]
    lengths = [len(build_tokenizer()(f" das Haus {i}", add_special_tokens=False)["input_ids"]) + 1 for i in range(20)]
    limit = TargetStatistics.of(lengths, []).max_new_tokens
    assert decodings == [{"max_new_tokens": limit, "stop": ["\n"]}] * 3
    # The adapter of these examples stores the same.
    (adapter, *_) = (folder / "work" / "trained").glob("pema-*/adapter/adapter_config.json")
    stored = read_json(adapter)["pema"]
    assert (stored["max_new_tokens"], stored["stop"]) == (limit, ["\n"])


def test_decoding_settings_count_for_every_method_and_are_part_of_a_result(folder, compared, capsys):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("[1e-6, 3e-2]", "[3e-2]")
    decoding = '[decoding]\nmax_new_tokens = 3\nnum_beams = 2\nstop = ["\\n", "Haus"]\nlength_penalty = 0.5\n'
    (folder / "short.toml").write_text(text + decoding, encoding="utf-8")
    experiment = read_config(folder / "short.toml", "compare")
    run_experiment(experiment, folder / "results", folder / "work")
    for file in (folder / "results" / "short").glob("*seed*.json"):
        result = read_json(file)
        assert result["signature"]["config"]["decoding"] == tomllib.loads(decoding)["decoding"]
        assert result["costs"]["generated_tokens"] <= 4 * 3
        assert result["costs"]["cut_texts"] is not None
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"alone-seed0: .*, \d of 4 texts cut at 3 tokens", said)
    (folder / "changed.toml").write_text('name = "short"\n' + text + decoding.replace("= 3", "= 4"), encoding="utf-8")
    with pytest.raises(MismatchError, match=r"another decoding.max_new_tokens: 3, not 4"):
        run_experiment(read_config(folder / "changed.toml", "compare"), folder / "results", folder / "work")


def test_a_failed_training_leaves_no_result_and_a_table_of_what_is_finished(folder, compared, monkeypatch, capsys):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("[1e-6, 3e-2]", "[1e30]")
    (folder / "diverged.toml").write_text(text, encoding="utf-8")
    arguments = ["compare", "diverged.toml", "-o", "results", "--work", "work"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["pema", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert re.search(r"pema: pema: the .*loss is .*training diverged", captured.err.splitlines()[-1])
    assert "Not finished: pema-seed0, pema-seed1. Run `pema compare` again" in " ".join(captured.out.split())
    left = [path.name for path in (folder / "results" / "diverged").iterdir() if "seed" in path.name]
    assert sorted(left) == ["alone-seed0.json", "alone-seed0.txt"]
    results = read_folder(folder / "results" / "diverged")
    assert list(results.rows) == ["alone"]
    assert results.missing == ("pema-seed0", "pema-seed1")
    assert not list((folder / "work" / "trained").glob("*.partial"))


def test_a_killed_training_is_reported(folder, compared, monkeypatch):
    def killed(command):
        return child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])

    monkeypatch.setattr(training_process, "child", killed)
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("rank = 16", "rank = 4")
    (folder / "killed.toml").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=r"the training process was killed by signal 9 .*enough memory"):
        run_experiment(read_config(folder / "killed.toml", "compare"), folder / "results", folder / "work")


def test_a_sweep_reports_every_point(folder, compared, capsys, monkeypatch):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace("rank = 16, ", "rank = 16, learning_rate = 3e-2, ")
    text = text.replace("learning_rate = [1e-6, 3e-2]", "examples = [10, 20]")
    (folder / "swept.toml").write_text(text, encoding="utf-8")
    arguments = ["sweep", str(folder / "swept.toml"), "-o", str(folder / "results"), "--work", str(folder / "work")]
    monkeypatch.setattr("sys.argv", ["pema", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "PEMA, examples=10" in shown
    assert "PEMA, examples=20" in shown
    common = read_json(folder / "results" / "swept" / "experiment.json")
    assert common["axes"] == {"examples": [10, 20]}
    assert common["methods"] == ["alone", "PEMA, examples=10", "PEMA, examples=20"]
    few, all_ = (read_json(folder / "results" / "swept" / f"pema-examples={n}-seed0.json") for n in (10, 20))
    assert few["dev_perplexity"] != all_["dev_perplexity"]
    assert few["trials"] == []
    document = report(folder / "results" / "swept")
    assert '"entry":"PEMA","settings":{"examples":10}' in document
    assert few["signature"]["config"]["data_sha256"] in document


def test_the_others_may_be_compared_with_several(folder, compared, capsys, monkeypatch):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace('"alone"', '["alone", "PEMA"]', 1)
    (folder / "both.toml").write_text('name = "tiny"\n' + text, encoding="utf-8")
    arguments = ["compare", str(folder / "both.toml"), "-o", str(folder / "results"), "--work", str(folder / "work")]
    monkeypatch.setattr("sys.argv", ["pema", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "difference from PEMA" in capsys.readouterr().out
    found = read_json(folder / "results" / "tiny" / "comparison.json")["differences"]
    one, other = ({each["metric"]: each for each in found if each["reference"] == name} for name in ("alone", "PEMA"))
    for metric, difference in one.items():
        assert difference["difference"] == -other[metric]["difference"]
        assert (difference["low"], difference["high"]) == (-other[metric]["high"], -other[metric]["low"])
    assert "significantly" in report(folder / "results" / "tiny")


def test_a_sweep_chooses_on_dev_at_every_point(folder, compared):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace("rank = 16, ", "rank = 16, learning_rate = 3e-2, ").replace(", lambda_max = 1.0", "")
    text = text.replace("grid = { learning_rate = [1e-6, 3e-2] }", "grid = { examples = [10, 20] }")
    (folder / "chosen.toml").write_text(text + "choose = { lambda_max = [1e-3, 0.9] }\n", encoding="utf-8")
    run_experiment(read_config(folder / "chosen.toml", "sweep"), folder / "results", folder / "work")
    for examples in (10, 20):
        result = read_json(folder / "results" / "chosen" / f"pema-examples={examples}-seed0.json")
        tried = {trial["settings"]["lambda_max"]: trial["dev_perplexity"] for trial in result["trials"]}
        assert tried[0.9] < tried[1e-3]
        assert result["settings"]["lambda_max"] == 0.9
        assert result["settings"]["examples"] == examples
        assert result["dev_perplexity"] == tried[0.9]
    assert read_json(folder / "results" / "chosen" / "experiment.json")["axes"] == {"examples": [10, 20]}


def test_the_examples_are_stored_with_the_outputs(folder, compared):
    lines = (folder / "results" / "tiny" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["source"] for line in lines] == [f"the house {i}" for i in range(30, 34)]


def test_comet_scores_join_the_comparison_when_every_run_has_them(folder, compared, monkeypatch):
    from pema.evaluation.elsewhere import digest
    from pema.tasks.readers import read_lines

    experiment, _ = compared
    place = folder / "results" / "tiny"
    (place / "comet").mkdir()
    references = [example.target for example in experiment.data.test]
    for number, name in enumerate(("alone-seed0", "pema-seed0", "pema-seed1")):
        scores = {
            "metric": "comet",
            "segments": [number / 2] * 4,
            "signature": "made",
            "hypotheses_sha256": digest(read_lines(place / f"{name}.txt")),
            "references_sha256": digest(references),
        }
        (place / "comet" / f"{name}.json").write_text(json.dumps(scores), encoding="utf-8")
        found = run_experiment(experiment, folder / "results", folder / "work")
        assert ("comet" in found.rows[0].metrics) == (number == 2)
    assert math.isclose(found.rows[1].metrics["comet"].mean, 0.75)
    document = report(place)
    assert '<th scope="col" data-first="descending" class="quality"><span>COMET</span></th>' in document
    assert "<dt>COMET</dt><dd>0.5  (made)</dd>" in document


def test_a_training_that_does_not_help_is_flagged(folder, compared, monkeypatch, capsys):
    """A learning rate that only harms keeps the weights of step 0."""
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("[1e-6, 3e-2]", "[300.0]")
    text = text.replace("rank = 16,", "rank = 16, clip = 1e6,").replace("seeds = [0, 1]", "seeds = [0]")
    (folder / "harmed.toml").write_text(text, encoding="utf-8")
    comparison = run_experiment(read_config(folder / "harmed.toml", "compare"), folder / "results", folder / "work")
    run = read_json(folder / "results" / "harmed" / "pema-seed0.json")
    losses = [point["held_out_loss"] for point in run["curve"]]
    assert min(losses[1:]) >= losses[0]
    assert run["training_helped"] is False
    assert [(flag.run, flag.reason) for flag in comparison.rows[1].no_help] == [("pema-seed0", "step 0")]
    assert comparison.rows[0].no_help is None
    assert "pema-seed0: " in (err := capsys.readouterr().err)
    assert "but training did not help" in err
    helped = results(folder)["pema-seed0"]
    assert helped["training_helped"] is True
    assert results(folder)["alone-seed0"].get("training_helped") is None


def test_texts_that_equal_the_plms_are_flagged(folder, compared):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("lambda_max = 1.0", "lambda_max = 0.0")
    text = text.replace("[1e-6, 3e-2]", "[3e-2]").replace("seeds = [0, 1]", "seeds = [0]")
    (folder / "unmixed.toml").write_text(text, encoding="utf-8")
    comparison = run_experiment(read_config(folder / "unmixed.toml", "compare"), folder / "results", folder / "work")
    assert [(flag.run, flag.reason) for flag in comparison.rows[1].no_help] == [("pema-seed0", "same texts")]


def test_results_of_other_settings_are_refused_before_the_first_run(folder, compared, monkeypatch):
    """The second line's result is in the way: the first line does not run."""
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("rank = 16", "rank = 8")
    text = text.replace('label = "alone"', 'label = "first"').replace('reference = "alone"', 'reference = "first"')
    (folder / "late.toml").write_text('name = "tiny"\n' + text, encoding="utf-8")
    before = (folder / "results" / "tiny" / "experiment.json").read_bytes()
    with pytest.raises(MismatchError, match=r"pema-seed0.json was run with another settings"):
        run_experiment(read_config(folder / "late.toml", "compare"), folder / "results", folder / "work")
    assert not (folder / "results" / "tiny" / "first-seed0.json").exists()
    assert (folder / "results" / "tiny" / "experiment.json").read_bytes() == before


def test_memories_and_representations_are_made_once_for_all_that_can_share_them(folder, compared, monkeypatch):
    """Presets, seeds and kNN-LM with the same contexts share one memory, and all methods one pass over dev."""
    from pema.generation import rounds
    from pema.memory import build as building

    built = []

    def build(plm, examples, *others, **settings):
        built.append(len(examples))
        return build_memory(plm, examples, *others, **settings)

    build_memory = building.build_memory
    monkeypatch.setattr(building, "build_memory", build)
    monkeypatch.setattr(rounds, "build_memory", build)
    text = (folder / "tiny.toml").read_text(encoding="utf-8").partition("[[methods]]")[0]
    for label, settings in (
        ("paper", 'preset = "paper", rank = 4'),
        ("best", 'preset = "residual", rank = 4'),
        ("constant", 'preset = "residual", rank = 4, schedule = "constant"'),
    ):
        text += f'[[methods]]\nlabel = "{label}"\nmethod = "pema"\nsettings = {{ {settings} }}\n'
    text = text.replace('reference = "alone"\n', "")
    (folder / "shared.toml").write_text(text, encoding="utf-8")
    run_experiment(read_config(folder / "shared.toml", "compare"), folder / "results", folder / "fresh")
    assert built == [20, 3]  # the training examples, and dev
    (folder / "other.toml").write_text(text.replace('"paper", rank = 4', '"paper", rank = 8'), encoding="utf-8")
    run_experiment(read_config(folder / "other.toml", "compare"), folder / "results", folder / "fresh")
    assert built == [20, 3, 3]  # another process, or PLM object, measures dev again


def test_device_and_batches_reach_the_plm_and_the_training(folder, compared, monkeypatch):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("[1e-6, 3e-2]", "[3e-2]")
    text = text.replace("seeds = [0, 1]", 'seeds = [0]\ndevice = "cpu"\nbatch_size = 3\nbatch_tokens = 64')
    (folder / "batches.toml").write_text(text, encoding="utf-8")
    experiment = read_config(folder / "batches.toml", "compare")
    (line,) = (line for line in experiment.lines() if line.label == "PEMA")
    job = Workplace(folder / "work", experiment).stages(line.method, line.settings, 0).job
    assert (job.device, job.batch_tokens) == ("cpu", 64)
    assert line.method.of({}).config(job).device == "cpu"
    assert line.method.of({"device": "auto"}).config(job).device == "auto"
    run_experiment(experiment, folder / "results", folder / "work")
    config = read_json(folder / "results" / "batches" / "pema-seed0.json")["signature"]["config"]
    assert (config["batch_size"], config["batch_tokens"]) == (3, 64)
    assert "device" not in config
    usual = results(folder)["pema-seed0"]["signature"]["config"]
    assert not {"batch_size", "batch_tokens", "device"} & set(usual)


def test_a_device_that_is_not_here_is_refused_when_the_file_is_read(folder):
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("[data]", 'device = "cuda:99"\n[data]')
    (folder / "nowhere.toml").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=r"device='cuda:99' cannot be used on this machine"):
        read_config(folder / "nowhere.toml", "compare")


def dry_run(folder, name, capsys, monkeypatch, *options):
    arguments = ["compare", f"{name}.toml", "-o", "results", "--work", "work", "--dry-run", *options]
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["pema", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_a_dry_run_says_what_is_left_and_starts_nothing(folder, compared, capsys, monkeypatch):
    monkeypatch.setattr("pema.experiments.workplace.train_in_process", None)
    before = sorted(folder.rglob("*"))
    lines = json.loads(dry_run(folder, "tiny", capsys, monkeypatch, "--json"))["lines"]
    assert [(line["label"], line["finished"], line["runs"]) for line in lines] == [("alone", 1, 0), ("PEMA", 2, 0)]
    assert all(line["seconds"] == line["trainings"] == line["memory_bytes"] == 0 for line in lines)
    text = (folder / "tiny.toml").read_text(encoding="utf-8").replace("[1e-6, 3e-2]", "[1e-6, 3e-2, 1e-3]")
    # A third candidate: another experiment, which finds the memory and the trainings of the other two.
    text += '[[methods]]\nlabel = "int8"\nmethod = "pema"\nsettings = { rank = 4, dtype = "int8" }\n'
    (folder / "more.toml").write_text(text, encoding="utf-8")
    before.append(folder / "more.toml")
    alone, pema, other = json.loads(dry_run(folder, "more", capsys, monkeypatch, "--json"))["lines"]
    assert (alone["runs"], alone["trainings"], alone["preparations"]) == (1, 0, 0)
    # One candidate with the first seed; with the second seed at most one, the first candidate's, if that is chosen.
    assert (pema["runs"], pema["trainings"], pema["preparations"]) == (2, 2, 0)
    assert (other["runs"], other["trainings"], other["preparations"]) == (2, 2, 1)
    assert other["seconds"] >= 2 * START > alone["seconds"] >= 0
    assert other["memory_bytes"] > 0
    shown = dry_run(folder, "more", capsys, monkeypatch)
    assert "No run was started." in " ".join(shown.split())
    assert sorted(folder.rglob("*")) == sorted(before)


def test_a_plan_measures_a_plm_once_and_counts_a_test_example_once(folder, compared, monkeypatch):
    experiment, _ = compared
    measured = []
    monkeypatch.setattr(Speed, "of", lambda *_: measured.append(1) or Speed(token=1.0, step=0.0, vector=0.0))
    test = tuple(replace(each, alternatives=(each.target,) * 7) for each in experiment.data.test)
    plans = [
        plan_experiment(replace(experiment, data=replace(experiment.data, test=part)), folder / "new", folder / "none")
        for part in (experiment.data.test, test)
    ]
    assert len(measured) == 2
    assert [line.seconds for line in plans[0]] == [line.seconds for line in plans[1]]


def test_estimates_follow_the_model_of_costs(folder, compared):
    """Twice the speed, epochs or examples are half or twice the time."""
    experiment, _ = compared
    workplace = Workplace(folder / "work", experiment)
    line = next(line for line in experiment.lines() if line.label == "PEMA")
    stages = workplace.stages(line.method, {**line.settings, "learning_rate": 3e-2}, 0)
    plm = workplace.plm({})
    sizes = Sizes.of(plm, stages, stages.job.train)
    assert sizes.examples == 20
    targets = [plm.tokenizer(f" das Haus {i}", add_special_tokens=False).input_ids for i in range(20)]
    assert sizes.targets == sum(len(target) + 1 for target in targets)
    speed = Speed(token=2.0, step=3.0, vector=5.0)
    assert train_seconds(stages, speed, sizes, 1) == START + 2 * sizes.targets * 3 * 5.0
    assert prepare_seconds(stages, speed, sizes, 32) == (sizes.prompts + sizes.targets) * 2.0
    assert run_seconds(speed, sizes, sizes, 4) == pytest.approx(
        2 * (2 * sizes.prompts + sizes.targets) + 5 * sizes.targets / 20 * 3.0
    )
    full = workplace.stages(get_method("full"), {"epochs": 1}, 0)
    assert train_seconds(full, speed, sizes, 1) == START + 3 * 2.0 * (sizes.prompts + sizes.targets)
    lora = workplace.stages(get_method("lora"), {"epochs": 1}, 0)
    numbers = sum(p.numel() for p in plm.model.parameters())
    assert memory_bytes(full, plm, sizes) - memory_bytes(lora, plm, sizes) == 3 * 4 * numbers
    measured = Speed.of(plm, stages, 4)
    assert 0 < measured.token < measured.step * 100
