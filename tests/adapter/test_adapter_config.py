import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.adapter.config import AdapterConfig, TrainConfig
from pema.adapter.presets import PRESETS, preset
from pema.errors import ConfigError
from pema.owner.contract import BESIDE_API, PLMDescription


def test_preset_paper_is_the_papers():
    paper = PRESETS["paper"]
    assert (paper.rank, paper.kappa, paper.dropout) == (512, 0.2, 0.2)
    assert (paper.optimizer, paper.learning_rate, paper.weight_decay, paper.clip) == ("adam", 1e-3, 0.0, 0.0)
    assert (paper.init, paper.residual, paper.activation, paper.vocabulary) == ("random", False, "none", "full")
    assert paper.reconstruction == "closed_form"
    assert (paper.warmup, paper.decay) == (0.0, "none")
    assert paper.dev_fraction > 0
    assert paper.patience >= 1


def test_preset_best_is_residual_nonlinear_and_copies():
    best = PRESETS["best"]
    assert dataclasses.replace(best, copy_width=0, copy_least=0.0) == PRESETS["residual"]
    assert best.copy_width > 0
    assert (best.residual, best.activation, best.kappa, best.vocabulary) == (True, "gelu", 0.0, "auto")
    assert best.optimizer == "adamw"
    assert not best.reconstructs


@pytest.mark.parametrize(
    ("pairs", "batch_size"), [(0, 64), (830, 64), (3_120, 64), (4_000, 80), (12_800, 256), (27_000, 256), (10**6, 256)]
)
def test_few_pairs_make_small_batches(pairs, batch_size):
    assert PRESETS["best"].with_steps(pairs).batch_size == batch_size
    assert PRESETS["paper"].with_steps(pairs).batch_size == 256


def test_a_given_batch_size_is_used_unchanged():
    assert preset("best", batch_size=256).with_steps(100).batch_size == 256
    assert preset("best", batch_size=256, least_steps=50).with_steps(100).batch_size == 64
    assert preset("best", batch_size=8).with_steps(100).batch_size == 8


@pytest.mark.parametrize("cls", [TrainConfig, AdapterConfig])
def test_every_setting_says_what_it_means(cls):
    assert all(len(f.metadata["help"]) > 5 for f in dataclasses.fields(cls))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_train_config_survives_json(name):
    assert TrainConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "rank=0 is too small: it must be at least 1"),
        ({"rank": 2.5}, "rank=2.5 must be a whole number"),
        ({"rank": True}, "rank=True must be a whole number"),
        ({"kappa": 1.5}, "kappa=1.5 is too large: it must be at most 1"),
        ({"kappa": float("nan")}, "kappa=nan must be finite"),
        ({"kappa": "0.2"}, "kappa='0.2' must be a number"),
        ({"dropout": 1.0}, "dropout=1.0 is too large: it must be less than 1"),
        ({"init": "zeros"}, "unknown init 'zeros': use random or pca"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd': use adam or adamw"),
        ({"activation": "gelu", "kappa": 0.0}, "activation='gelu' with residual=False"),
        ({"activation": "gelu", "residual": True, "kappa": 0.2}, "kappa=0.2 with activation='gelu'"),
        ({"copy_width": 8}, "copy_width=8 with kappa=0.2: use kappa=0"),
        ({"copy_width": 8, "kappa": 0.0, "vocabulary": "seen"}, "copy_width=8 with vocabulary='seen'"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 with optimizer='adam'"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
    ],
)
def test_train_config_refuses(values, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        TrainConfig(**values)


def test_unknown_settings_are_refused():
    with pytest.raises(
        ConfigError, match="unknown setting 'lerning_rate' of TrainConfig: did you mean 'learning_rate'"
    ):
        preset("paper", lerning_rate=1.0)
    with pytest.raises(ConfigError, match="unknown setting 'qqq' of TrainConfig: use rank, kappa"):
        TrainConfig.from_dict({"qqq": 1})
    with pytest.raises(ConfigError, match="unknown preset 'worst': use paper, best, residual or private"):
        preset("worst")


def test_a_presets_rank_is_reduced_to_fit_the_plm_with_a_note(capsys):
    assert preset("paper").fitted(384).rank == 384
    assert "rank 512 becomes 384" in capsys.readouterr().err
    assert preset("paper").fitted(1024).rank == 512
    assert preset("residual").fitted(64).rank == 6 * 64


def plm_of(d, architecture="LlamaForCausalLM"):
    return PLMDescription("a PLM", architecture, "a", "b", "c", d, d, 100, "head_input", 64, (2,), 7)


def test_a_requested_rank_that_is_too_large_is_refused():
    plm = plm_of(384)
    with pytest.raises(ConfigError, match="rank=400 is larger than d = 384, and it adds nothing to rank d"):
        preset("paper", rank=400).require_suited(plm)
    with pytest.raises(ConfigError, match=r"rank=400 is larger than d = 384, and init='pca' .* or init='random'"):
        preset("residual", rank=400, init="pca").require_suited(plm)
    for config in (preset("residual", rank=4000), preset("paper", rank=384), preset("paper", rank=400, fit_rank=True)):
        config.require_suited(plm)
    assert preset("residual", rank=4000).fitted(384).rank == 4000
    assert preset("paper", rank=384).fitted(384).rank == 384


def test_an_output_matrix_of_its_own_is_for_the_tokens_of_an_api():
    own = preset("best", vocabulary="own")
    with pytest.raises(ConfigError, match=r"vocabulary='own' .* and a PLM has an LM head of its own: use vocabulary='"):
        own.require_suited(plm_of(384))
    own.require_suited(plm_of(384, BESIDE_API + "LlamaForCausalLM"))


@given(rank=st.integers(1, 5000), d=st.integers(1, 600), name=st.sampled_from(sorted(PRESETS)))
def test_fitted_is_idempotent_and_makes_a_valid_adapter(rank, d, name):
    config = dataclasses.replace(PRESETS[name], rank=rank, fit_rank=True).fitted(d)
    assert config.rank <= rank
    assert config.fitted(d) is config
    AdapterConfig(d=d, vocabulary_size=7, rank=config.rank, residual=config.residual, activation=config.activation)


def test_adapter_config_refuses():
    with pytest.raises(ConfigError, match="rank=9 is larger than d = 8"):
        AdapterConfig(d=8, vocabulary_size=7, rank=9)
    with pytest.raises(ConfigError, match="unknown vocabulary 'half': use full, seen or own"):
        AdapterConfig(d=8, vocabulary_size=7, rank=3, vocabulary="half")
    with pytest.raises(ConfigError, match=r"unknown setting 'ranks' of AdapterConfig: .*did you mean 'rank'"):
        AdapterConfig.from_dict({"d": 8, "vocabulary_size": 7, "ranks": 3})
    with pytest.raises(ConfigError, match="activation='gelu' with residual=False"):
        AdapterConfig(d=8, vocabulary_size=7, rank=3, activation="gelu")


def test_adapter_config_and_its_plm_agree_in_size():
    from made_memories import describe, make_head

    plm = describe(make_head(d=12, V=40))
    with pytest.raises(ConfigError, match="d=8, vocabulary_size=40 differ from those of made: 12, 40"):
        AdapterConfig(d=8, vocabulary_size=40, rank=3, plm=plm)
    config = AdapterConfig(d=12, vocabulary_size=40, rank=3, plm=plm, training={"figures": {"pairs": 3}})
    assert AdapterConfig.from_dict(config.to_dict()) == config


def test_under_privacy_best_is_the_preset_private():
    budget = {"dp_epsilon": 8.0, "dp_delta": 1e-3}
    assert preset("best", **budget) == preset("private", **budget)
    assert preset("private", **budget) == dataclasses.replace(PRESETS["private"], **budget)
    assert (preset("best", **budget).rank, preset("best", **budget).batch_size) == (64, 128)
    assert preset("best", **budget, rank=16).rank == 16
    with pytest.raises(ConfigError, match="preset 'private' trains with DP-SGD: give dp_epsilon and dp_delta"):
        preset("private")
    with pytest.raises(ConfigError, match=r"kappa=0.2 with dp_epsilon=8.0"):
        preset("paper", **budget)
