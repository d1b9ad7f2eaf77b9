"""The vocabulary "own": an output matrix of the adapter's own over the tokens of the memory's targets."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from pema.adapter.config import AdapterConfig, TrainConfig
from pema.adapter.copying import BLANK
from pema.adapter.likelihood import log_p_pema
from pema.adapter.loss import JointLoss, OwnCrossEntropy
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant
from pema.adapter.training import train
from pema.errors import AdapterError, ConfigError
from pema.files import read_json, write_json
from pema.generation.plugin import attach_to
from pema.generation.rounds import adapt
from pema.memory.build import build_memory
from pema.memory.config import BuildConfig
from pema.memory.prompts import ContextTokens
from pema.owner.contract import BESIDE_API
from pema.owner.head import Head
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.registry import get_task
from tiny import build_model, build_tokenizer

V, D = 40, 8
SHAPE = {"rank": 8, "kappa": 0.0, "dropout": 0.0, "residual": True, "activation": "gelu"}
SETTINGS = SHAPE | {"epochs": 4, "batch_size": 16, "learning_rate": 1e-2}


def head(bias=True, cap=5.0):
    torch.manual_seed(3)
    return Head(torch.randn(V, D), torch.randn(V) if bias else None, scale=1.5, soft_cap=cap)


def adapter(copy_width=0, tokens=(1, 4, 9, 30)):
    config = AdapterConfig(
        d=D, vocabulary_size=V, rank=4, residual=True, activation="gelu", vocabulary="own", copy_width=copy_width
    )
    made = Adapter(config, torch.tensor(tokens))
    with torch.no_grad():
        torch.manual_seed(1)
        made.U.normal_()
        made.B_pd.normal_()
    return made


def test_log_p_is_the_softmax_of_its_own_rows_with_bias_scale_and_cap_of_the_head():
    own, over, f = adapter(), head(), torch.randn(5, D)
    log_p = own.log_probs(f, over)
    for n in range(5):
        raw = 1.5 * (own(f)[n] @ own.U.T + over.bias[own.tokens])
        expected = torch.log_softmax(5 * torch.tanh(raw / 5), -1)
        torch.testing.assert_close(log_p[n, own.tokens], expected)
    outside = torch.ones(V, dtype=torch.bool)
    outside[own.tokens] = False
    assert torch.isneginf(log_p[:, outside]).all()


def test_with_the_rows_of_the_head_it_is_the_vocabulary_seen():
    own, over, f = adapter(), head(), torch.randn(5, D)
    seen = Adapter(AdapterConfig(**(vars(own.config) | {"vocabulary": "seen"})), own.tokens)
    seen.load_state_dict({name: t for name, t in own.state_dict().items() if name != "U"})
    own.U.data.copy_(over.weight[own.tokens])
    torch.testing.assert_close(own.log_probs(f, over), seen.log_probs(f, over))


def test_what_is_copied_may_lie_outside_the_seen_tokens():
    own, over, f = adapter(copy_width=4), head(), torch.randn(2, D)
    prompt = torch.tensor([[7, 4], [12, 9]])
    none = torch.full_like(prompt, BLANK)
    context = ContextTokens(prompt, none, torch.zeros_like(prompt), torch.full((2, 1), BLANK))
    p = own.log_probs(f, over, context).exp().detach()
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    assert float(p[0, 7]) > 0
    assert float(p[1, 12]) > 0
    assert float(p[0, 12]) == 0
    targets = torch.tensor([7, 9])
    torch.testing.assert_close(
        log_p_pema(own, over, f, targets, context).exp(), p[torch.arange(2), targets].double(), rtol=1e-4, atol=1e-6
    )


def test_the_loss_is_that_of_its_own_rows_and_trains_them():
    own, over = adapter(), head()
    f, targets = torch.randn(6, D), torch.tensor([1, 4, 9, 30, 1, 9])
    loss = JointLoss(OwnCrossEntropy(over, own), kappa=0.0)(own, f, targets)
    expected = cross_entropy(own.log_probs(f, over)[:, own.tokens], torch.tensor([0, 1, 2, 3, 0, 2]))
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    assert float(own.U.grad.abs().min()) > 0
    torch.testing.assert_close(OwnCrossEntropy(over, own).each(own(f), targets).mean(), expected.detach())


WORDS = ("the house", "a dog", "one cat", "two houses", "the cat", "three dogs")
EXAMPLES = [Example(source, source.upper()) for source in WORDS]


class Proxy(LocalPLM):
    """A PLM that stands for the model of an API."""

    @property
    def description(self):
        described = super().description
        return replace(described, architecture=BESIDE_API + described.architecture)


@pytest.fixture(scope="module")
def trained(tiny_plm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    plm = Proxy(build_model("llama"), build_tokenizer())
    memory = build_memory(plm, EXAMPLES, get_task("style"), folder / "memory")
    config = TrainConfig(**SETTINGS, vocabulary="own", copy_width=4)
    return plm, memory, config, folder, train(memory, config, folder / "adapter")


def test_training_begins_with_the_rows_of_the_head_and_is_read_back_as_it_is(trained):
    _, memory, _, folder, (made, figures) = trained
    assert figures["held_out_cross_entropy"] < figures["start_cross_entropy"]
    assert torch.equal(made.tokens, memory.view().targets_seen())
    rows = memory.head().weight[made.tokens]
    assert 0 < float((made.U - rows).abs().max()) < 1
    read = Adapter.from_pretrained(folder / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), made.state_dict().values(), strict=True))
    assert read.config.vocabulary == "own"
    untrained, _ = train(memory, TrainConfig(**SETTINGS | {"learning_rate": 0.0}, vocabulary="own"), folder / "zero")
    assert torch.equal(untrained.U, rows)


def test_a_plm_with_an_lm_head_is_refused_before_anything_is_built(tiny_plm, tmp_path):
    plm, config = tiny_plm(), TrainConfig(**SETTINGS, vocabulary="own")
    with pytest.raises(ConfigError, match="vocabulary='own' is an output matrix for an API's tokens, and"):
        adapt(plm, EXAMPLES, get_task("style"), tmp_path / "adapted", config, BuildConfig())
    assert not list(tmp_path.iterdir())
    memory = build_memory(plm, EXAMPLES, get_task("style"), tmp_path / "memory")
    with pytest.raises(ConfigError, match="has an LM head of its own: use vocabulary='auto' or 'full'"):
        train(memory, config, tmp_path / "adapter")


def test_an_adapter_with_an_output_matrix_is_not_attached_to_a_model(trained):
    plm, *_, (made, _) = trained
    with pytest.raises(ConfigError, match="has an output matrix of its own, for an API's tokens"):
        attach_to(plm, made, Constant(0.5))


@pytest.mark.parametrize("vocabulary", ["seen", "full"])
def test_a_file_with_other_tensors_than_the_config_says_is_refused(trained, tmp_path, vocabulary):
    made = trained[-1][0]
    made.save_pretrained(tmp_path)
    values = read_json(tmp_path / "adapter_config.json")
    values["pema"]["vocabulary"] = vocabulary
    values["pema"]["copy_width"] = 0 if vocabulary == "seen" else 4
    write_json(tmp_path / "adapter_config.json", values)
    with pytest.raises(AdapterError, match=r"expected the tensors A, B_pd"):
        Adapter.from_pretrained(tmp_path)


def test_a_file_without_its_output_matrix_is_refused(trained, tmp_path):
    memory = trained[1]
    train(memory, TrainConfig(**SETTINGS, vocabulary="seen"), tmp_path / "seen")
    values = read_json(tmp_path / "seen" / "adapter_config.json")
    values["pema"]["vocabulary"] = "own"
    write_json(tmp_path / "seen" / "adapter_config.json", values)
    with pytest.raises(AdapterError, match="expected the tensors A, B_pd, U, tokens"):
        Adapter.from_pretrained(tmp_path / "seen")
