"""What methods require of a PLM, and what PLMs provide; refused before the first run."""

from types import SimpleNamespace

import pytest

from pema.errors import ConfigError, OwnerError, PemaError
from pema.experiments.config import read_config
from pema.experiments.requirements import provided_by, require_provided, require_suited
from pema.methods.contract import with_weights
from pema.methods.decoding import decoding_for
from pema.methods.registry import METHODS, get_method
from pema.owner.opening import accepted
from pema.tasks.example import Example
from pema.tasks.registry import get_task

ALL = frozenset({"weights", "probabilities", "likelihoods", "teacher", "predicted"})
ENGINE, PREDICTING, API = ALL - {"weights"}, frozenset({"probabilities", "predicted"}), frozenset({"teacher"})


class Owner:
    """A PLM elsewhere, of which a key may have some modes of contexts."""

    def __init__(self, contexts, sessions=True):
        self.contexts, self.sessions = contexts, sessions
        self.description = SimpleNamespace(name="elsewhere")

    @property
    def generator(self):
        if not self.sessions:
            raise OwnerError("does not let this key open sessions")

    def forecast(self, mode, lengths):
        assert lengths == []
        if mode not in self.contexts:
            raise OwnerError("does not offer them")
        return []


class Seller:
    """An API that gives its likeliest tokens."""

    @property
    def proposer(self):
        return self


def test_a_plm_provides_what_its_owner_gives(tiny_plm):
    assert provided_by(tiny_plm()) == ALL
    assert provided_by(Owner(("teacher", "predicted"))) == ENGINE
    assert provided_by(Owner(("predicted",))) == PREDICTING
    assert provided_by(Seller()) == API
    with pytest.raises(OwnerError, match="does not let this key open sessions"):
        provided_by(Owner(("teacher",), sessions=False))


def test_methods_without_weights_run_with_every_engine():
    free = {name for name in METHODS if "weights" not in get_method(name).of({}).requires}
    assert free == {"plm", "few-shot", "retrieved-few-shot", "pema", "knn-lm"}
    assert "weights" not in get_method("small-lm").of({"small": "x"}).requires
    for name in METHODS:  # whoever needs weights in the table requires them here
        method = get_method(name).of({})
        assert method.needs.weights == "none" or "weights" in method.requires


def experiment(folder, method, settings="", top="", more=""):
    (folder / "data.tsv").write_text("a\tb\nc\td\n", encoding="utf-8")
    parts = "".join(f'{part} = {{ data = "data.tsv" }}\n' for part in ("train", "dev", "test"))
    text = f'plm = "api.toml"\ntask = "style"\n{top}\n[data]\nname = "made"\n{parts}'
    text += f'[[methods]]\nlabel = "line"\nmethod = "{method}"\nsettings = {{ {settings} }}\n{more}'
    (folder / "made.toml").write_text(text, encoding="utf-8")
    return read_config(folder / "made.toml", "compare")


@pytest.mark.parametrize(
    ("method", "settings", "top", "more", "provided", "message"),
    [
        ("full", "", "", "", ENGINE, "full needs the PLM's weights in this process, and api.toml is run elsewhere"),
        ("offsite", "", "", "", ENGINE, "offsite needs the PLM's weights"),
        ("small-lm", "", "", "", ENGINE, "small-lm needs the PLM's weights"),
        ("small-lm", 'small = "x"', "", "", API, "small-lm needs the probabilities of all tokens, and api.toml gives"),
        ("plm", "", 'metrics = ["label_accuracy"]', "", API, "label_accuracy needs the probabilities of all tokens"),
        ("few-shot", "", "", "", API, "few-shot chooses by the likelihood of dev targets, which api.toml does not"),
        (
            "pema",
            "",
            'choose_by = "perplexity"',
            "grid = { rank = [4, 8] }",
            API,
            "choose_by = 'perplexity' chooses by the likelihood",
        ),
        ("pema", 'contexts = "predicted"', "", "", API, "pema needs `predicted` contexts, .* set contexts = 'teacher'"),
        ("pema", "", "", "", PREDICTING, "pema needs `teacher` contexts, .* set contexts = 'predicted'"),
    ],
)
def test_what_a_plm_does_not_provide_is_refused_with_the_label_and_the_remedy(
    tmp_path, method, settings, top, more, provided, message
):
    made = experiment(tmp_path, method, settings, top, more)
    with pytest.raises(ConfigError, match=f"line: {message}"):
        require_provided(made, "api.toml", provided)
    require_provided(made, "another", provided)  # no line has this PLM
    require_provided(made, "api.toml", ALL)


@pytest.mark.parametrize(
    ("method", "settings", "provided"),
    [
        ("plm", "", API),
        ("few-shot", "k = 1", API),
        ("pema", "", API),
        ("pema", 'contexts = "predicted", targets = "matched", rounds = 1', PREDICTING),
        ("knn-lm", "", ENGINE),
        ("small-lm", 'small = "x"', ENGINE),
    ],
)
def test_a_method_runs_where_it_gets_what_it_requires(tmp_path, method, settings, provided):
    if method == "knn-lm":
        pytest.importorskip("faiss")
    require_provided(experiment(tmp_path, method, settings), "api.toml", provided)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("pema", 'vocabulary = "own"', "vocabulary='own' is an output matrix for an API's tokens, and"),
        ("pema", 'preset = "paper", rank = 33', "rank=33 is larger than d = 32"),
        ("small-lm", "layers = 9", "small-lm: layers=9 is too large: the PLM has 2 layers"),
        ("offsite", "adapters = 2", "offsite: the PLM has 2 layers, so adapters=2 at each end leave no middle layer"),
        ("small-lm", 'small = "./missing"', "the folder ./missing does not exist"),
    ],
)
def test_settings_that_do_not_suit_a_plm_are_refused_with_the_label(tiny_plm, tmp_path, method, settings, message):
    made = experiment(tmp_path, method, settings)
    with pytest.raises(PemaError, match=f"line: {message}"):
        require_suited(made, "api.toml", tiny_plm())
    require_suited(made, "another", tiny_plm())  # no line has this PLM


def test_weights_are_taken_from_a_plm_in_this_process_only(tiny_plm):
    plm = tiny_plm()
    assert with_weights(plm, "lora") is plm
    with pytest.raises(ConfigError, match="lora needs the PLM's weights in this process, and elsewhere is run"):
        with_weights(Owner(()), "lora")


def test_an_api_decodes_greedily(tiny_plm):
    template, examples = get_task("style").template, [Example("a", "b")]
    for settings in ({"num_beams": 2}, {"do_sample": True, "max_new_tokens": 3, "stop": ()}):
        with pytest.raises(ConfigError, match=rf"decoding: {next(iter(settings))}=.* needs the probabilities of all"):
            decoding_for(Seller(), template, examples, settings)
    assert decoding_for(tiny_plm(), template, examples, {"num_beams": 2})["num_beams"] == 2


def test_settings_for_loading_reach_the_plms_that_take_them(tmp_path):
    settings = {"dtype": "float32", "device_map": "cuda"}
    assert accepted("folder", settings) == settings
    assert accepted("https://host", settings) == {"dtype": "float32"}
    for engine in (
        "llamacpp:x.gguf",
        "llamacpp+http://host#x.gguf",
        "logprobs+http://host#head",
        "vllm+http://host#head",
    ):
        assert accepted(engine, settings) == {}
    (tmp_path / "api.toml").write_text(
        'base_url = "https://host/v1"\nmodel = "m"\ntokenizer = "t"\nproxy = "https://other"\n', encoding="utf-8"
    )
    assert accepted(str(tmp_path / "api.toml"), settings) == {"dtype": "float32"}
