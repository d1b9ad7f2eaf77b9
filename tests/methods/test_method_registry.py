import pytest

from pema.errors import ConfigError
from pema.methods.registry import METHODS, get_method


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_name_that_it_is_found_by_and_defaults_for_all_settings(name):
    method = get_method(name).of({})
    assert method.name == name
    assert type(method).of(method.settings()) == method


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match=r"unknown method 'knnlm': use plm, few-shot, .*, knn-lm"):
        get_method("knnlm")
