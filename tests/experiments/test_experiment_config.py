"""Files of comparisons: valid contents, and refusals by name."""

import pytest

from pema.errors import ConfigError, DataError
from pema.experiments.config import read_config
from pema.experiments.experiment import build_method

WHOLE = """
title = "A comparison"
plm = "embedded"
seeds = [0, 1]
reference = "alone"
[data]
name = "made"
train = { data = "train.tsv" }
dev = { data = "dev.tsv", limit = 2 }
test = { source = "test.en", target = "test.de" }
[budget]
trials = 2
epochs = 3
[[methods]]
label = "alone"
method = "plm"
[[methods]]
label = "PEMA"
method = "pema"
settings = { preset = "paper", examples = 2 }
grid = { learning_rate = [1e-3, 1e-4] }
"""


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "dev"):
        rows = "".join(f"the {part} {i}\tdas {part} {i}\n" for i in range(4))
        (tmp_path / f"{part}.tsv").write_text(rows, encoding="utf-8")
    for side in ("en", "de"):
        (tmp_path / f"test.{side}").write_text(f"one {side}\ntwo {side}\n", encoding="utf-8")
    return tmp_path


def read(folder, text=WHOLE, kind="compare", **options):
    file = folder / "small.toml"
    file.write_text(text, encoding="utf-8")
    return read_config(file, kind, **options)


def test_a_whole_one(folder):
    found = read(folder)
    assert (found.name, found.title, found.seeds, found.references) == ("small", "A comparison", (0, 1), ("alone",))
    assert found.metrics == ("bleu", "chrf")
    assert [len(part) for part in (found.data.train, found.data.dev, found.data.test)] == [4, 2, 2]
    assert (found.budget.trials, found.budget.epochs, found.budget.patience) == (2, 3, 3)
    (_, pema) = found.lines()
    assert [candidate["learning_rate"] for candidate in pema.candidates()] == [1e-3, 1e-4]
    assert build_method(pema.method, next(pema.candidates())).changes == {"learning_rate": 1e-3}


def test_a_method_may_run_with_the_first_seeds_only(folder):
    experiment = read(folder, WHOLE + "seeds = 1\n")
    assert [(line.label, seed) for line, seed in experiment.runs()] == [("alone", 0), ("PEMA", 0)]
    with pytest.raises(ConfigError, match=r"seeds=0 is too small: it must be at least 1"):
        read(folder, WHOLE + "seeds = 0\n")


def test_several_targets_are_pairs_in_training_and_references_elsewhere(folder, capsys):
    rows = '{"source": "a", "targets": ["b", "c"]}\n{"source": "d", "targets": ["e"]}\n'
    for part in ("train", "dev", "test"):
        (folder / f"{part}.jsonl").write_text(rows, encoding="utf-8")
    parts = "\n".join(f'{part} = {{ data = "{part}.jsonl" }}' for part in ("train", "dev", "test"))
    data = read(folder, WHOLE[: WHOLE.index("train =")] + parts + WHOLE[WHOLE.index("\n[budget]") :]).data
    assert [(each.source, each.references) for each in data.train] == [("a", ("b",)), ("a", ("c",)), ("d", ("e",))]
    for part in (data.dev, data.test):
        assert [(each.source, each.references) for each in part] == [("a", ("b", "c")), ("d", ("e",))]
    assert f"{folder}/dev.jsonl: 2 examples with 3 targets (source and targets)" in capsys.readouterr().err


def test_a_sweep_chooses_at_every_point_of_its_grid(folder):
    text = WHOLE + "choose = { lambda_max = [0.5, 0.7, 0.9] }\n"
    (_, *lines) = read(folder, text, "sweep").lines()
    assert [line.label for line in lines] == ["PEMA, learning_rate=0.001", "PEMA, learning_rate=0.0001"]
    for line, learning_rate in zip(lines, (1e-3, 1e-4), strict=True):
        tried = [(each["learning_rate"], each["lambda_max"]) for each in line.candidates()]
        assert tried == [(learning_rate, 0.5), (learning_rate, 0.7), (learning_rate, 0.9)]
    with pytest.raises(ConfigError, match="`choose` is for sweeps: in a comparison, name 'lambda_max' in `grid`"):
        read(folder, text)


def test_a_sweep_chooses_among_no_more_trainings_than_a_comparison(folder):
    with pytest.raises(ConfigError, match=r"PEMA, learning_rate=0.001: 3 trainings .* budget's trials=2"):
        read(folder, WHOLE + "choose = { rank = [4, 8, 16] }\n", "sweep")
    with pytest.raises(ConfigError, match="'learning_rate' is given in grid and in choose"):
        read(folder, WHOLE + "choose = { learning_rate = [1e-2] }\n", "sweep")


def test_the_reference_of_a_sweep_is_a_line_of_its_table(folder):
    with pytest.raises(ConfigError, match=r"unknown reference 'PEMA': use alone, PEMA, learning_rate=0\.001"):
        read(folder, WHOLE.replace('reference = "alone"', 'reference = "PEMA"'), "sweep")
    point = WHOLE.replace('reference = "alone"', 'reference = "PEMA, learning_rate=0.001"')
    assert read(folder, point, "sweep").references == ("PEMA, learning_rate=0.001",)


def test_data_start_from_the_data_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert read_config_from(elsewhere, folder).data.train
    with pytest.raises(DataError, match=r"train\.tsv"):
        read(elsewhere)


def read_config_from(configs, data):
    file = configs / "small.toml"
    file.write_text(WHOLE, encoding="utf-8")
    return read_config(file, "compare", data)


def test_the_data_that_the_package_ships(folder):
    data = WHOLE.split("[data]")[0] + '[data]\nname = "support"\n' + WHOLE[WHOLE.index("[budget]") :]
    found = read(folder, data)
    assert found.metrics == ("bleu", "chrf", "formality_accuracy")
    assert len(found.data.train) == 500


def test_the_digest_of_the_data_changes_with_one_character(folder):
    before = read(folder).data.digest()
    text = (folder / "test.de").read_text(encoding="utf-8")
    (folder / "test.de").write_text(text.replace("one", "ane"), encoding="utf-8")
    assert read(folder).data.digest() != before


def test_annotated_references(folder):
    for register in ("formal", "informal"):
        (folder / register).write_text("[F]Sie[/F]\n[F]Sie[/F]\n", encoding="utf-8")
    test = 'target = "test.de", formal = "formal", informal = "informal"'
    assert read(folder, WHOLE.replace('target = "test.de"', test)).metrics[-1] == "formality_accuracy"


def test_a_sweep_may_have_more_points_than_trials(folder):
    many = WHOLE.replace("[1e-3, 1e-4]", "[1e-3, 1e-4, 1e-5]")
    assert len(list(read(folder, many, "sweep").lines())) == 1 + 3
    with pytest.raises(ConfigError, match=r"PEMA: 3 trainings of candidates are more than the budget's trials=2"):
        read(folder, many)


@pytest.mark.parametrize(
    ("trials", "method", "rates"),
    [
        (2, 'method = "full"', [1e-4, 3e-5]),
        (9, 'method = "full"', [1e-4, 3e-5, 3e-4, 1e-5]),
        (1, 'method = "full"', [1e-4]),
        (4, 'method = "lora"\ngrid = { rank = [4, 8] }', [1e-3, 3e-4] * 2),
        (2, 'method = "lora"\ngrid = { rank = [4, 8] }', [1e-3] * 2),
        (4, 'method = "full"\nsettings = { learning_rate = 1e-2 }', [1e-2]),
        (4, 'method = "full"\ngrid = { learning_rate = [1e-2, 1e-3] }', [1e-2, 1e-3]),
    ],
)
def test_default_candidates_fit_the_budget_and_give_way_to_the_users(folder, trials, method, rates):
    text = WHOLE.replace("trials = 2", f"trials = {trials}").replace('method = "plm"', method)
    line, _ = read(folder, text.replace("[1e-3, 1e-4]", "[1e-3]")).lines()
    assert [candidate["learning_rate"] for candidate in line.candidates()] == rates
    assert line.trainings == len(rates)


def test_sweeps_have_no_default_candidates(folder):
    line, *_ = read(folder, WHOLE.replace('method = "plm"', 'method = "full"'), "sweep").lines()
    assert [dict(each) for each in line.candidates()] == [{}]


def test_candidates_that_share_a_training_are_one_trial(folder):
    many = WHOLE.replace("[1e-3, 1e-4]", "[1e-3, 1e-4], lambda_max = [0.3, 0.6, 0.9]")
    (_, pema) = read(folder, many).lines()
    assert len(list(pema.candidates())) == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A', 'titel = "A', r"small.toml: unknown setting 'titel' of the file: .*did you mean 'title'\?"),
        ('title = "A comparison"', "title = 3", "title=3 must be a text"),
        ('title = "A comparison"', 'plm_dtype = "flaot32"', "unknown plm_dtype 'flaot32': use auto, float32"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds \[1, 1\] must be one or more different numbers"),
        ('reference = "alone"', 'reference = "none"', "unknown reference 'none': use alone or PEMA"),
        ('name = "made"', "", r"'data.name' is missing"),
        ("dev = {", "test = {", "small.toml is not TOML"),
        ("dev = {", "dve = {", r"unknown setting 'data.dve' of \[data\]: .*did you mean 'dev'\?"),
        ('title = "A comparison"', 'name = "../up"', "name '../up' becomes a folder"),
        ('title = "A comparison"', 'metrics = ["blue"]', "unknown metric 'blue'"),
        ('title = "A comparison"', 'metrics = ["formality_accuracy"]', "needs formal and informal references"),
        ('title = "A comparison"', 'metrics = ["bleu:moses"]', "unknown sacreBLEU tokenizer 'moses'"),
        ('title = "A comparison"', "metrics = []", "metrics is empty"),
        ("limit = 2", "lines = 2", r"unknown setting 'data.dev.lines' of a part of the data"),
        ("limit = 2", 'formal = "dev.tsv"', r"data.dev: give formal and informal, both or neither"),
        ("trials = 2", "trails = 2", r"unknown setting 'budget.trails' of \[budget\]: .*did you mean 'trials'\?"),
        ("epochs = 3", "epochs = 0", r"budget\.epochs=0 is too small: it must be at least 1"),
        (
            "[budget]",
            "[decoding]\nmax_new_token = 3\n[budget]",
            r"decoding: .*did you mean 'max_new_tokens'",
        ),
        ("[budget]", "[decoding]\nmax_new_tokens = 0\n[budget]", r"decoding: max_new_tokens=0 is too small"),
        ("[budget]", "[decoding]\nstop = 'x'\n[budget]", r"decoding: stop='x' must be a list"),
        (
            "[budget]",
            "[decoding]\nlength_penalty = 2.0\n[budget]",
            "decoding: length_penalty has no effect",
        ),
        (
            "[budget]",
            "[decoding]\nlambda_max = 0.5\n[budget]",
            "decoding: lambda_max is not a setting of .decoding",
        ),
        (
            "[budget]",
            "[decoding]\nbatch_size = 4\n[budget]",
            r"batch_size is not a setting of .decoding.: .*top of the",
        ),
        ('label = "PEMA"', 'label = "alone"', "two methods have the label 'alone'"),
        ('method = "pema"', 'method = "pemma"', "unknown method 'pemma'"),
        ("learning_rate = [1e-3, 1e-4]", "learning_rate = 1e-3", "PEMA: grid.learning_rate must be a list"),
        ("learning_rate = [1e-3, 1e-4]", 'preset = ["best"]', "PEMA: 'preset' is given in settings and in grid"),
        ("learning_rate = [1e-3, 1e-4]", "leraning_rate = [1e-3]", "PEMA: .*leraning_rate"),
        ('preset = "paper"', 'preset = "papers"', "PEMA: unknown preset 'papers'"),
        ("examples = 2", 'learning_rate = "fast"', "PEMA: .*learning_rate"),
        ("[budget]", "[budget", "small.toml is not TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(folder, old, new, message):
    assert WHOLE.count(old) >= 1
    with pytest.raises(ConfigError, match=message):
        read(folder, WHOLE.replace(old, new, 1))


def test_a_part_of_the_data_that_is_missing(folder):
    line = next(line for line in WHOLE.splitlines(keepends=True) if line.startswith("dev = "))
    with pytest.raises(ConfigError, match=r"'data\.dev' is missing"):
        read(folder, WHOLE.replace(line, ""))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none.toml cannot be read"):
        read_config(tmp_path / "none.toml", "compare")


def test_nothing_to_run(folder):
    with pytest.raises(ConfigError, match="there is nothing to run"):
        read(folder, WHOLE[: WHOLE.index("[[methods]]")].replace('reference = "alone"', ""))


METHODS = WHOLE[: WHOLE.index("[[methods]]")].replace('reference = "alone"\n', "")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("LoRA (8)", "LoRA 8"), r"'LoRA \(8\)' and 'LoRA 8' are too similar: .* in lora-8-seed0\.json"),
        (("PEMA", "pema"), "'PEMA' and 'pema' are too similar"),
        (("λ", "κ"), r"too similar: the runs of both would be in -seed0\.json"),
        (("a" * 250, "b"), "names files and is too long: use at most 200 characters"),
    ],
)
def test_labels_whose_files_would_clash_are_refused_before_the_first_run(folder, labels, message):
    entries = "".join(f'[[methods]]\nlabel = "{label}"\nmethod = "plm"\n' for label in labels)
    with pytest.raises(ConfigError, match=message):
        read(folder, METHODS + entries)


def test_points_of_a_sweep_whose_files_would_clash_are_refused_before_the_first_run(folder):
    entry = '[[methods]]\nlabel = "PEMA"\nmethod = "pema"\ngrid = { plm = ["a/b", "a b"] }\n'
    with pytest.raises(ConfigError, match="'PEMA, plm=a/b' and 'PEMA, plm=a b' are too similar"):
        read(folder, METHODS + entry, "sweep")
