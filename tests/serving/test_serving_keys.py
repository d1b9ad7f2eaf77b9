import hmac

from served import KEYS, key

from pema.serving import keys
from pema.serving.keys import digest, identify, new_key


def test_keys_are_random_and_found_by_their_hash():
    assert len({new_key() for _ in range(100)}) == 100
    assert new_key().startswith("pema_")
    assert len(new_key()) >= 5 + 43  # 32 bytes in base64
    assert identify(KEYS["acme"], [key("other"), key("acme")]).name == "acme"
    for presented in ("", "pema_", KEYS["acme"][:-1], KEYS["acme"] + " ", digest(KEYS["acme"]), "\udcff"):
        assert identify(presented, [key("acme"), key("other")]) is None


def test_every_key_is_compared_whichever_fits(monkeypatch):
    seen = []
    compare = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: seen.append(b) or compare(a, b))
    three = [key("acme"), key("other"), key("spare")]
    for presented in (KEYS["acme"], KEYS["spare"], "wrong"):
        seen.clear()
        identify(presented, three)
        assert seen == [k.sha256.encode() for k in three]
