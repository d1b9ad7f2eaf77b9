"""A masked PLM computes the same as the PLM in secret coordinates; and the limits of the mask."""

import logging
import stat
from dataclasses import fields, replace

import pytest
import torch

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.schedule import Constant, GradualUnrolling, NoAdapter
from pema.adapter.training import train
from pema.errors import ConfigError, MismatchError, OwnerError
from pema.evaluation.perplexity import perplexity
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.bundle import NormSettings
from pema.owner.contract import PLMDescription
from pema.owner.head import Head, Norm
from pema.owner.mask import Mask, MaskedPLM, MaskedSession, rotate
from pema.tasks.example import Example
from pema.tasks.registry import get_task
from tiny import FAMILIES

MASK, OTHER = Mask(bytes(range(32))), Mask(bytes(32))
PROMPTS = [[1, 5, 9, 40], [1, 7], [1, 30, 31, 32, 33, 34]]
TEXTS = [
    ("The house is small.", "Das Haus ist klein."),
    ("The dog is here.", "Der Hund ist hier."),
    ("Where is the house?", "Wo ist das Haus?"),
    ("The dog is small.", "Der Hund ist klein."),
    ("Here is the dog.", "Hier ist der Hund."),
    ("The house is here.", "Das Haus ist hier."),
]


class Described:
    """As much of a PLM as a mask looks at before it is used."""

    def __init__(self, head, tap="head_input"):
        self._head = head
        self.description = PLMDescription(
            "it", "It", "f" * 64, "t" * 64, "h" * 64, head.d, head.d_tap, head.vocabulary_size, tap, 128, (2,), 1
        )

    def head(self):
        return self._head


@pytest.mark.parametrize("d", [1, 2, 32, 129])
def test_the_rotation_is_orthogonal(d):
    Q = MASK.rotation(d, "it")
    assert Q.dtype == torch.float64
    assert (Q @ Q.T - torch.eye(d)).abs().max() < 1e-12
    assert (Q.T @ Q - torch.eye(d)).abs().max() < 1e-12


def test_the_rotation_follows_from_the_secret_and_the_purpose_alone():
    Q = MASK.rotation(32, "it")
    torch.manual_seed(5)
    assert torch.equal(Mask(bytes(range(32))).rotation(32, "it"), Q)
    for other in (OTHER.rotation(32, "it"), MASK.rotation(32, "that"), Mask(bytes(31) + b"\1").rotation(32, "it")):
        # Two independent rotations agree no better than two random directions do.
        assert (other @ Q.T).abs().max() < 0.8


def test_the_rotation_stays_the_same_from_release_to_release():
    expected = [
        [0.03877410967553652, -0.6898400148664675, -0.722922763722309],
        [-0.293863342822638, -0.6993467637826831, 0.6515814912440292],
        [0.9550606808805261, -0.1871760077459722, 0.22983524090161978],
    ]
    torch.testing.assert_close(MASK.rotation(3, "it"), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_rotation_is_uniformly_distributed():
    """The trace of a uniform orthogonal 3 x 3 matrix has mean 0, mean square 1 and mean fourth power 3."""
    draws = [Mask(i.to_bytes(32, "big")).rotation(3, "it") for i in range(4000)]
    traces = torch.stack([Q.trace() for Q in draws])
    for power, mean in ((1, 0), (2, 1), (4, 3)):
        values = traces**power
        assert abs(values.mean() - mean) < 4 * values.std() / len(draws) ** 0.5
    # So has the trace of the matrix times any fixed one: no direction is preferred.
    shifted = torch.stack([Q.roll(1, 0).trace() for Q in draws])
    assert abs(shifted.mean()) < 4 * shifted.std() / len(draws) ** 0.5
    determinants = torch.stack([torch.linalg.det(Q) for Q in draws])
    assert abs((determinants > 0).double().mean() - 0.5) < 4 * 0.5 / len(draws) ** 0.5


def test_the_secret_is_not_in_the_representation():
    assert str(MASK) == repr(MASK) == "Mask()"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plm(tiny_plm, family):
    plm = tiny_plm(family)
    masked = MaskedPLM(plm, MASK)
    head = masked.head()
    assert (head.scale, head.soft_cap, head.norm, head.projection) == (
        plm.head().scale,
        plm.head().soft_cap,
        None,
        None,
    )
    assert head.bias is plm.head().bias or torch.equal(head.bias, plm.head().bias)
    sequences, starts = [[*prompt, 11, 12, 13] for prompt in PROMPTS], [1, 1, 1]
    plain = {answer.index: answer.representations for answer in plm.represent(sequences, starts)}
    Q = MASK.rotation(head.d, plm.description.fingerprint).float()
    for answer in masked.represent(sequences, starts):
        f, Qf = plain[answer.index], answer.representations
        torch.testing.assert_close(Qf, f @ Q.T, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(head(Qf), plm.head()(f), atol=1e-4, rtol=1e-5)
        assert (Qf - f).norm() > 0.5 * f.norm()
    with torch.no_grad():
        logits = plm.model(input_ids=torch.tensor([sequences[0]])).logits[0, :-1]
    (answer,) = masked.represent(sequences[:1], starts[:1])
    torch.testing.assert_close(head(answer.representations), logits, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama", "gemma2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 1e-2), (torch.float64, 1e-9)])
def test_types_are_kept(tiny_plm, family, dtype, tolerance):
    plm = tiny_plm(family, dtype=dtype)
    masked = MaskedPLM(plm, MASK)
    assert masked.head().weight.dtype == dtype
    (plain,), (answer,) = plm.represent([PROMPTS[2]], [1]), masked.represent([PROMPTS[2]], [1])
    assert answer.representations.dtype == plain.representations.dtype
    expected = plain.representations.double() @ plm.head().weight.double().T
    found = answer.representations.double() @ masked.head().weight.double().T
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_predicted_contexts_have_the_same_tokens(tiny_plm):
    plm = tiny_plm()
    masked = MaskedPLM(plm, MASK)
    Q = MASK.rotation(32, plm.description.fingerprint).float()
    plain = {answer.index: answer for answer in plm.predict(PROMPTS, [4, 2, 3])}
    for answer in masked.predict(PROMPTS, [4, 2, 3]):
        assert torch.equal(answer.generated, plain[answer.index].generated)
        torch.testing.assert_close(
            answer.representations, plain[answer.index].representations @ Q.T, atol=1e-4, rtol=1e-5
        )
        assert torch.equal(masked.head()(answer.representations).argmax(-1), answer.generated)


def test_a_decoding_session_hands_out_the_rotated_representations():
    class Session:
        held_bytes = 7

        def __init__(self):
            self.representations = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
            self.calls = []

        def advance(self, tokens, parents=None):
            self.calls.append((tokens, parents))
            self.representations = self.representations.roll(1, 1)

        def close(self):
            self.calls.append("close")

    class Sessions(Described):
        def open_session(self, prompts):
            assert prompts == PROMPTS[:2]
            return session

    session = Session()
    masked = MaskedPLM(Sessions(Head(torch.randn(5, 32))), MASK)
    opened = masked.open_session(PROMPTS[:2])
    assert isinstance(opened, MaskedSession)
    Q = MASK.rotation(32, "f" * 64).float()
    for step in (None, ([3, 4], [1, 0])):
        if step is not None:
            opened.advance(*step)
        torch.testing.assert_close(opened.representations, session.representations @ Q.T, atol=1e-5, rtol=1e-5)
    assert opened.held_bytes == 7
    opened.close()
    assert session.calls == [([3, 4], [1, 0]), "close"]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_generating_goes_through_the_mask(tiny_plm, family):
    """The model of a masked PLM sees Q f and W_hd Q^T, and generates what the PLM does, with an adapter too."""
    plm, task = tiny_plm(family), get_task("translation")
    masked = MaskedPLM(plm, MASK)
    assert torch.equal(masked.model.get_output_embeddings().weight, masked.head().weight)
    sources = [source for source, _ in TEXTS]
    settings = {"max_new_tokens": 9, "batch_size": 4}
    alone = [generate(one, None, sources, task, NoAdapter(), **settings) for one in (plm, masked)]
    assert alone[0] == alone[1]

    config = AdapterConfig(d=32, vocabulary_size=320, rank=8)
    adapters = {name: Adapter(replace(config, plm=one.description)) for name, one in (("f", plm), ("Qf", masked))}
    Q = MASK.rotation(32, plm.description.fingerprint).float()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapters["f"].B_pd.normal_(generator=random)
        adapters["Qf"].A.copy_(adapters["f"].A @ Q.T)
        adapters["Qf"].B_pd.copy_(Q @ adapters["f"].B_pd)
    for schedule in (Constant(0.9), GradualUnrolling(0.9)):
        mixed = generate(plm, adapters["f"], sources, task, schedule, **settings)
        assert generate(masked, adapters["Qf"], sources, task, schedule, **settings) == mixed
        assert mixed != alone[0]
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        generate(masked, adapters["f"], sources, task, Constant(0.9), **settings)


def test_the_description_tells_masks_apart_and_hides_the_fingerprints(tiny_plm):
    plm = tiny_plm()
    plain, masked = plm.description, MaskedPLM(plm, MASK).description
    changed = {f.name for f in fields(plain) if getattr(plain, f.name) != getattr(masked, f.name)}
    assert changed == {"fingerprint", "head_fingerprint"}
    assert MaskedPLM(plm, Mask(bytes(range(32)))).description == masked
    for one, other in ((plain, masked), (masked, plain), (masked, MaskedPLM(plm, OTHER).description)):
        with pytest.raises(MismatchError, match="belongs to another PLM"):
            one.require_same(other, "the adapter")
    with pytest.raises(MismatchError, match="belongs to another LM head"):
        masked.require_same(replace(masked, head_fingerprint=plain.head_fingerprint), "the adapter")


def test_the_masked_head_is_the_same_bundle_after_a_restart_and_on_disk(tiny_plm, tmp_path):
    masked = MaskedPLM(tiny_plm(), MASK)
    again = MaskedPLM(tiny_plm(), MASK)
    assert torch.equal(masked.head().weight, again.head().weight)
    assert masked.head().fingerprint == again.head().fingerprint == masked.description.head_fingerprint
    masked.head().save(tmp_path / "head")
    loaded = Head.load(tmp_path / "head")
    assert loaded.fingerprint == masked.description.head_fingerprint
    assert torch.equal(loaded.weight, masked.head().weight)


def test_the_head_is_rotated_whole_where_it_is_rotated_in_pieces(monkeypatch):
    from pema.owner import mask as module

    weight = torch.randn(50, 8)
    whole = MaskedPLM(Described(Head(weight)), MASK).head().weight
    monkeypatch.setattr(module, "_ROWS", 7)
    torch.testing.assert_close(MaskedPLM(Described(Head(weight)), MASK).head().weight, whole)


def test_the_norms_input_is_refused_by_name(tiny_plm):
    with pytest.raises(ConfigError, match=r"needs tap 'head_input', but .* is read at 'norm_input'.* Use tap"):
        MaskedPLM(tiny_plm(tap="norm_input"), MASK)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("norm", {"norm": Norm(NormSettings("rms", 1e-5), None, None)}),
        ("projection", {"projection": torch.randn(8, 12)}),
    ],
)
def test_a_head_with_something_before_the_product_is_refused_by_name(name, parts):
    with pytest.raises(ConfigError, match=f"the head of it has a {name} in front of W_hd"):
        MaskedPLM(Described(Head(torch.randn(20, 8), **parts)), MASK)


def test_an_adapter_trains_on_a_masked_memory(tiny_plm, tmp_path):
    task, examples = get_task("translation"), [Example(s, t) for s, t in TEXTS * 2]
    plm = tiny_plm()
    masked = MaskedPLM(plm, MASK)
    config = preset("paper", rank=8, epochs=3, batch_size=16, seed=0)
    found = {}
    for name, one in (("plain", plm), ("masked", masked)):
        memory = build_memory(one, examples, task, tmp_path / name, dtype="float32")
        assert memory.manifest.plm == one.description
        assert torch.equal(memory.head().weight, one.head().weight)
        train(memory, config, tmp_path / f"{name}-adapter")
        adapter = Adapter.from_pretrained(tmp_path / f"{name}-adapter")
        adapter.require(one.description)
        found[name] = memory, adapter
    before, after = (perplexity(found["masked"][0].view(), masked.head(), a) for a in (None, found["masked"][1]))
    assert after < before
    assert before == pytest.approx(perplexity(found["plain"][0].view(), plm.head()), rel=1e-4)
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        found["masked"][1].require(plm.description)
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        found["plain"][1].require(masked.description)
    with pytest.raises(MismatchError, match="another PLM"):
        build_memory(plm, examples, task, tmp_path / "masked", dtype="float32")
    assert Memory.open(tmp_path / "masked").head().fingerprint == masked.description.head_fingerprint


# What is hidden, and what is not.


def recovered(released, table):
    """The share of released rows whose nearest row of the true table, by cosine, is their own."""
    released, table = (torch.nn.functional.normalize(x, dim=1) for x in (released, table))
    return ((released @ table.T).argmax(1) == torch.arange(len(table))).float().mean().item()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma"])
def test_tied_embeddings_cannot_be_read_off_a_masked_head(tiny_plm, family):
    plm = tiny_plm(family)
    table = plm.model.get_input_embeddings().weight
    assert table.data_ptr() == plm.head().weight.data_ptr()
    assert recovered(plm.head().weight, table) == 1.0
    # By chance each of the V rows is found with probability 1 / V: about Poisson(1) in all, and 9 or more are found
    # once in a million times.
    for secret in (MASK, OTHER):
        assert recovered(MaskedPLM(plm, secret).head().weight, table) * len(table) < 9


def test_inner_products_and_singular_values_stay(tiny_plm):
    plm = tiny_plm("gpt2")
    W, masked = plm.head().weight, MaskedPLM(plm, MASK).head().weight
    torch.testing.assert_close(masked @ masked.T, W @ W.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(masked), torch.linalg.svdvals(W), atol=1e-5, rtol=1e-5)


def procrustes(masked, known):
    """The orthogonal matrix nearest to turning `masked` rows into `known` ones (Schoenemann 1966)."""
    U, _, V = torch.linalg.svd(known.T.double() @ masked.double())
    return (U @ V).float()


def test_d_known_rows_determine_the_rotation(tiny_plm):
    plm = tiny_plm("gpt2")
    W, masked = plm.head().weight, MaskedPLM(plm, MASK).head().weight
    known = torch.arange(32)
    Q = procrustes(masked[known], W[known])
    torch.testing.assert_close(rotate(masked, Q), W, atol=1e-4, rtol=1e-4)
    assert recovered(rotate(masked, Q), W) == 1.0
    # So does who knows them roughly, such as those of the public model that this one was tuned from.
    rough = W + 0.3 * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
    assert recovered(rotate(masked, procrustes(masked, rough)), W) == 1.0
    # Rows fewer than d leave the rest of the space free to turn: the other rows are found worse, the fewer there are.
    few = procrustes(masked[known[:4]], W[known[:4]])
    assert recovered(rotate(masked, few)[4:], W[4:]) < 0.2


def gains_axes(Qf):
    """Unit vectors along the axes of the ellipsoid that the representations lie on: columns, (d, d).

    f = gain * u with |u|^2 = d for a root mean square norm, so (Qf)^T M (Qf) = d with M = Q diag(gain^-2) Q^T, whose
    eigenvectors are the columns of Q where the gains differ. M is found by least squares from d (d + 1) / 2 contexts.
    """
    Qf = Qf.double()
    d = Qf.shape[1]
    i, j = torch.triu_indices(d, d)
    products = Qf[:, i] * Qf[:, j]
    entries = torch.linalg.lstsq(products, torch.full((len(Qf), 1), float(d), dtype=torch.float64)).solution[:, 0]
    M = torch.zeros(d, d, dtype=torch.float64)
    M[i, j] = entries / 2
    return torch.linalg.eigh(M + M.T).eigenvectors.float()


@pytest.mark.parametrize("gains", ["differ", "equal"])
def test_the_gains_of_a_final_norm_give_the_axes_away(tiny_model, tiny_tokenizer, gains):
    from pema.owner.local import LocalPLM

    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.5, 2, 32) if gains == "differ" else torch.full((32,), 1.5))
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(4)
    plm = LocalPLM(model, tiny_tokenizer())
    masked = MaskedPLM(plm, MASK)
    words = torch.randint(3, 320, (120, 12), generator=torch.Generator().manual_seed(0)).tolist()
    Qf = torch.cat([answer.representations for answer in masked.represent(words, [1] * len(words))])
    found = masked.head().weight.float() @ gains_axes(Qf)
    columns, true = (torch.nn.functional.normalize(x.float(), dim=0) for x in (found, plm.head().weight))
    best = (columns.T @ true).abs().max(0).values
    if gains == "differ":
        # W_hd itself, but for the order and the signs of its columns.
        assert best.min() > 0.999
    else:
        assert best.max() < 0.9


# The file of the secret.


def test_a_new_secret_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "deep" / "secret.key"
    assert Mask.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 32
    assert [p.name for p in path.parent.iterdir()] == ["secret.key"]
    assert Mask.read(path).secret == path.read_bytes()
    other = tmp_path / "other.key"
    assert Mask.create(other)
    assert other.read_bytes() != path.read_bytes()


def test_a_secret_that_is_there_is_kept(tmp_path):
    path = tmp_path / "secret.key"
    path.write_bytes(bytes(range(32)))
    assert not Mask.create(path)
    assert Mask.read(path) == MASK


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(33), b"00" * 32])
def test_a_secret_of_another_length_is_refused(tmp_path, content):
    path = tmp_path / "secret.key"
    path.write_bytes(content)
    with pytest.raises(
        OwnerError, match=rf"secret\.key has {len(content)} bytes, expected 32 for a mask's secret: give"
    ):
        Mask.read(path)


def test_a_secret_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(OwnerError, match=r"nowhere does not exist: .* `pema release PLM"):
        Mask.read(tmp_path / "nowhere")
    with pytest.raises(OwnerError, match="cannot be read: Is a directory"):
        Mask.read(tmp_path)


def test_a_secret_that_others_may_read_is_warned_of(tmp_path, caplog):
    path = tmp_path / "secret.key"
    Mask.create(path)
    with caplog.at_level(logging.WARNING):
        Mask.read(path)
        assert not caplog.records
        path.chmod(0o640)
        Mask.read(path)
    assert "others may read the mask's secret" in caplog.text
    assert path.read_bytes().hex() not in caplog.text


@pytest.mark.parametrize("length", [0, 8, 31, 33])
def test_a_secret_in_the_process_has_its_length_too(length):
    with pytest.raises(ConfigError, match=f"has 32 bytes, not {length}"):
        Mask(bytes(length))
