"""The description of an API in a TOML file."""

from pathlib import Path

import pytest

from pema.errors import ConfigError, OwnerError
from pema.owner.openai_api.config import APIConfig, is_described

WHOLE = """
base_url = "https://api.example.org/v1"
model = "big"
tokenizer = "tokens"
proxy = "smollm2-135m"
max_requests = 10
max_cost = 2
prompt_price = 0.15
completion_price = 0.6
cache = "answers.sqlite"
"""


def test_a_file_is_read_with_the_paths_beside_it(tmp_path):
    (tmp_path / "tokens").mkdir()
    file = tmp_path / "api.toml"
    file.write_text(WHOLE)
    config = APIConfig.read(file)
    assert config == APIConfig(
        base_url="https://api.example.org/v1",
        model="big",
        tokenizer=str(tmp_path / "tokens"),
        max_requests=10,
        max_cost=2.0,
        prompt_price=0.15,
        completion_price=0.6,
        cache=tmp_path / "answers.sqlite",
    )
    assert config.cost(2_000_000, 1_000_000) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("top_logprobs = 2", "top_logprobs=2 is too small: it must be at least 5"),
        ("top_logprobs = 21", "top_logprobs=21 is too large: it must be at most 20"),
        ('endpoint = "responses"', "unknown endpoint 'responses'|unknown api.toml.endpoint 'responses'"),
        ("blocks = 3", "unknown setting 'api.toml.blocks' of the description of an API"),
        ("max_cost = 3", "max_cost=3.0 needs prompt_price and completion_price"),
        ("block = 0", "block=0 is too small"),
        ("x =", "is not a TOML file"),
    ],
)
def test_wrong_descriptions_are_refused_by_name(tmp_path, line, message):
    file = tmp_path / "api.toml"
    file.write_text(f'base_url = "https://a/v1"\nmodel = "m"\ntokenizer = "t"\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        APIConfig.read(file)


def test_a_missing_field_and_a_missing_file_are_named(tmp_path):
    file = tmp_path / "api.toml"
    file.write_text('base_url = "https://a/v1"\nmodel = "m"\n')
    with pytest.raises(ConfigError, match=r"'api\.toml.tokenizer' is missing"):
        APIConfig.read(file)
    with pytest.raises(OwnerError, match=r"absent\.toml cannot be read: No such file"):
        APIConfig.read(Path("absent.toml"))


def test_names_that_end_in_toml_are_those_of_descriptions():
    assert is_described("a/API.TOML")
    assert not is_described("https://host/v1")
