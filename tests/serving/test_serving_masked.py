"""One server, three forms of the head: what crosses is what each key's form allows, and nothing more."""

import json

import pytest
import torch
from served import bearer, key, opened, refusal, served, tensors

from pema.errors import ConfigError, OwnerError
from pema.owner.head import Head
from pema.owner.mask import Mask, MaskedPLM
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
