from pathlib import Path

import pytest

from pema.errors import ConfigError
from pema.serving.policy import Batching, Key, Limits, Policy

HASH = "a" * 64
KEY = f'[[keys]]\nname = "acme"\nsha256 = "{HASH}"\n'
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def read(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return Policy.read(path)


def test_every_field_can_be_set(tmp_path):
    policy = read(
        tmp_path,
        f"""
        mask_secret = "secret.key"
        quota_file = "/var/quotas.json"
        [limits]
        body_bytes = 1000
        session_idle_seconds = 9
        [batching]
        window_ms = 0.5
        [[keys]]
        name = "acme"
        sha256 = "{HASH}"
        endpoints = ["plm", "metrics"]
        taps = ["norm_input"]
        contexts = ["predicted"]
        head = "masked"
        mask_secret = "acme.key"
        tokens_per_minute = 5
        tokens_per_day = 6
        requests_per_second = 0.5
        """,
    )
    assert policy.limits == Limits(body_bytes=1000, session_idle_seconds=9)
    assert policy.batching == Batching(window_ms=0.5)
    assert policy.mask_secret == str(tmp_path / "secret.key")
    assert policy.quota_file == "/var/quotas.json"
    assert policy.keys == (
        Key(
            name="acme",
            sha256=HASH,
            endpoints=("plm", "metrics"),
            taps=("norm_input",),
            contexts=("predicted",),
            head="masked",
            mask_secret=str(tmp_path / "acme.key"),
            tokens_per_minute=5,
            tokens_per_day=6,
            requests_per_second=0.5,
        ),
    )


def test_an_empty_policy_is_the_default(tmp_path):
    assert read(tmp_path, "") == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limts]\n", "unknown setting 'limts': .*did you mean 'limits'"),
        ("[limits]\nbody_byte = 5\n", r"unknown setting 'limits.body_byte': .*did you mean 'body_bytes'"),
        ("[limits]\nbody_bytes = 0\n", r"limits.body_bytes: it must be greater than or equal to 1, not 0"),
        ('[limits]\nbody_bytes = "5"\n', r"limits.body_bytes: it must be a valid integer, not '5'"),
        ("[batching]\nzzzz = 5\n", r"unknown setting 'batching.zzzz': use window_ms"),
        (KEY + 'haed = "none"\n', r"unknown setting 'keys\[0\].haed' of key acme: .*did you mean 'head'"),
        (KEY + 'head = "full"\n', r"keys\[0\].head \(key acme\): it must be 'plain', 'masked' or 'none', not 'full'"),
        (KEY + 'endpoints = ["predict", "prdict"]\n', r"keys\[0\].endpoints\[1\] \(key acme\)"),
        (KEY + "requests_per_second = 0\n", r"keys\[0\].requests_per_second \(key acme\)"),
        (KEY + 'head = "masked"\n', r'key acme has head = "masked" and there is no mask'),
        (KEY + 'mask_secret = "own"\n', r'key acme has a mask_secret and head = "plain", which does not use it'),
        (KEY + KEY, r"two keys have the name acme"),
        (KEY + KEY.replace("acme", "b"), r"two keys have the sha256 aaaa"),
        ('[[keys]]\nname = "a b"\nsha256 = "c"\n', r"keys\[0\].name \(key a b\)"),
        (
            '[[keys]]\nname = "acme"\nsha256 = "the key itself"\n',
            r"keys\[0\].sha256 \(key acme\): it must be the 64 hex",
        ),
        ('[[keys]]\nname = "acme"\n', r"keys\[0\].sha256 \(key acme\): field required"),
        (KEY + 'contexts = "predicted"\n', r"\(key acme\): it must be a list, in brackets, not 'predicted'"),
        (KEY.replace("[[keys]]", "[keys]"), r"keys: each key must be a table of its own, .* the line \[\[keys\]\]"),
        ("keys = 3\n", r"keys: each key must be a table"),
        ("keys = [3]\n", r"keys\[0\]: each key must be a table"),
        ("[limits\n", "policy.toml is not TOML"),
    ],
)
def test_what_is_no_policy_is_refused_by_file_and_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "policy.toml") in str(caught.value)


def test_a_key_in_the_place_of_its_hash_is_not_repeated(tmp_path):
    with pytest.raises(ConfigError, match="not the key itself") as caught:
        read(tmp_path, KEY.replace(HASH, "pema_SECRET"))
    assert "SECRET" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml cannot be read"):
        Policy.read(tmp_path / "nowhere.toml")


def test_the_documentation_names_every_field_with_its_default():
    text = DOCS.read_text(encoding="utf-8")
    for model in (Key, Limits, Batching, Policy):
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in text, name
            assert field.description in text, name
