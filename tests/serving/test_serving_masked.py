"""One server, three forms of the head: what crosses is what each key's form allows, and nothing more."""

import gc
import json
import threading
from weakref import ref

import pytest
import torch
from served import bearer, key, opened, refusal, served, tensors

from pema.errors import ConfigError, OwnerError
from pema.owner.head import Head
from pema.owner.mask import Mask, MaskedPLM
from pema.serving.batcher import Sequences
from pema.serving.heads import KEPT, PackedHeads
from pema.serving.metrics import Metrics
from pema.serving.policy import Policy
from pema.serving.service import Service


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    path = tmp_path_factory.mktemp("mask") / "secret.key"
    assert Mask.create(path)
    return path


@pytest.fixture(scope="module")
def client(plm, secret):
    keys = (key("acme", head="masked"), key("other"), key("spare", head="none"))
    with served(plm, Policy(keys=keys, mask_secret=str(secret))) as client:
        yield client


def test_a_masked_key_sees_everything_through_the_mask(client, plm, secret):
    masked = MaskedPLM(plm, Mask.read(secret))
    about = client.get("/v1/plm", headers=bearer("acme")).json()
    assert about["head"] == "masked"
    assert about["description"] == masked.description.to_dict() | masked.description.accepted()
    found, texts = tensors(client.get("/v1/head", headers=bearer("acme")))
    assert texts["fingerprint"] == masked.description.head_fingerprint
    assert torch.equal(found["weight"], masked.head().weight)
    assert not torch.allclose(found["weight"], plm.head().weight, atol=0.1)
    assert secret.read_bytes() not in json.dumps(about).encode()

    contexts, _ = tensors(
        client.post("/v1/represent", json={"sequences": [[1, 5, 6, 7]], "starts": [1]}, headers=bearer("acme"))
    )
    truth = next(iter(plm.represent([[1, 5, 6, 7]], [1]))).representations
    head = Head.of(found, json.loads(texts["settings"]), texts["fingerprint"])
    assert not torch.allclose(contexts["representations"], truth, atol=0.1)
    torch.testing.assert_close(head(contexts["representations"]), plm.head()(truth), atol=1e-4, rtol=1e-4)

    predicted, _ = tensors(client.post("/v1/predict", json={"prompts": [[1, 5]], "steps": [8]}, headers=bearer("acme")))
    assert head(predicted["representations"]).argmax(-1).tolist() == predicted["generated"].tolist()

    client.headers.update(bearer("acme"))
    first, path = opened(client, [[1, 5, 6]])
    step, _ = tensors(client.post(f"{path}/advance", json={"step": 1, "tokens": [7]}))
    for f, row in ((first, 2), (step["representations"], 3)):
        expected = next(iter(plm.represent([[1, 5, 6, 7, 0]], [row + 1]))).representations[:1]
        torch.testing.assert_close(head(f), plm.head()(expected), atol=1e-4, rtol=1e-4)


def test_the_others_see_it_plain_or_not_at_all(client, plm):
    assert (
        client.get("/v1/plm", headers=bearer("other")).json()["description"]
        == plm.description.to_dict() | plm.description.accepted()
    )
    found, _ = tensors(client.get("/v1/head", headers=bearer("other")))
    assert torch.equal(found["weight"], plm.head().weight)
    refusal(client.get("/v1/head", headers=bearer("spare")), 403, "head_withheld")


@pytest.fixture(scope="module")
def two(plm, secret, tmp_path_factory):
    """A server with a mask of its own for each of two keys, and one key with the common mask."""
    folder = tmp_path_factory.mktemp("own")
    assert Mask.create(folder / "acme.key")
    assert Mask.create(folder / "other.key")
    keys = tuple(key(name, head="masked", mask_secret=str(folder / f"{name}.key")) for name in ("acme", "other"))
    policy = Policy(keys=(*keys, key("spare", head="masked")), mask_secret=str(secret))
    with served(plm, policy) as client:
        yield client, {"acme": folder / "acme.key", "other": folder / "other.key", "spare": secret}


def test_each_key_has_the_rotation_of_its_own_secret(two, plm):
    client, secrets = two
    body = {"sequences": [[1, 5, 6, 7]], "starts": [1]}
    truth = next(iter(plm.represent([[1, 5, 6, 7]], [1]))).representations
    fingerprints, rotated = set(), []
    for name, path in secrets.items():
        masked = MaskedPLM(plm, Mask.read(path))
        about = client.get("/v1/plm", headers=bearer(name)).json()["description"]
        assert about == masked.description.to_dict() | masked.description.accepted()
        fingerprints |= {about["fingerprint"], about["head_fingerprint"]}
        head, texts = tensors(client.get("/v1/head", headers=bearer(name)))
        assert texts["fingerprint"] == about["head_fingerprint"]
        assert torch.equal(head["weight"], masked.head().weight)
        f = tensors(client.post("/v1/represent", json=body, headers=bearer(name)))[0]["representations"]
        torch.testing.assert_close(f @ head["weight"].T, truth @ plm.head().weight.T, atol=1e-4, rtol=1e-4)
        rotated.append(f)
    assert len(fingerprints) == 6
    for i, f in enumerate(rotated):
        assert not any(torch.allclose(f, other, atol=0.1) for other in rotated[i + 1 :])
        torch.testing.assert_close(f.norm(dim=1), truth.norm(dim=1))


def test_requests_under_different_masks_share_a_forward_pass(two, plm):
    client, _ = two
    service = client.app.state.lifecycle.service()
    calls = []
    hold, go = threading.Event(), threading.Event()
    blocked = service.batcher.call(lambda: (hold.set(), go.wait(10)), key="held", tokens=0)
    assert hold.wait(10)
    views = [service.accounts[name].plm for name in ("acme", "other")]
    work = [Sequences(plm, "represent", [[1, 5, 6, 7]], [1], view) for view in views] + [
        Sequences(plm, "represent", [[1, 5, 6, 7]], [1])
    ]
    service.batcher._seen, seen = lambda *counts: calls.append(counts), service.batcher._seen
    try:
        futures = [service.batcher.contexts(w, key=str(i), tokens=4) for i, w in enumerate(work)]
        go.set()
        answers = [future.result(10)[0].representations for future in futures]
    finally:
        service.batcher._seen = seen
    blocked.result(10)
    assert calls == [(3, 12)]
    for view, answer in zip(views, answers, strict=False):
        expected = next(iter(view.represent([[1, 5, 6, 7]], [1]))).representations
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


def test_packed_heads_are_made_once_and_few_are_kept(plm):
    masks = [MaskedPLM(plm, Mask(bytes([n]) * 32)) for n in range(5)]
    heads = PackedHeads()
    packed = [ref(heads.get(masked)) for masked in masks]
    gc.collect()
    assert [reference() is not None for reference in packed] == [False] * (5 - KEPT) + [True] * KEPT
    assert heads.get(masks[-1]) is packed[-1]()
    # One that a client still reads is not made a second time, however many came after it.
    read = heads.get(masks[0])
    for masked in masks[1:]:
        heads.get(masked)
    assert heads.get(masks[0]) is read
    assert not any("_head" in vars(masked) for masked in masks)


def test_a_policy_that_this_plm_cannot_keep(plm, tiny_plm, secret, tmp_path):
    with pytest.raises(OwnerError, match=r"nowhere\.key does not exist"):
        Service(plm, Policy(mask_secret=str(tmp_path / "nowhere.key")), Metrics())
    with pytest.raises(ConfigError, match="needs tap 'head_input'"):
        Service(tiny_plm(tap="norm_input"), Policy(mask_secret=str(secret)), Metrics())


def test_a_tokenizer_that_is_code_is_not_served(plm):
    class Slow:
        backend_tokenizer = None

    class Coded:
        description, tokenizer, head = plm.description, Slow(), plm.head

    with pytest.raises(OwnerError, match="tokenizer Slow is not a fast one"):
        Service(Coded(), Policy(), Metrics())
