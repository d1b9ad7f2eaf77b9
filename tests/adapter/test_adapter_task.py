import pytest

from pema.adapter.config import AdapterConfig
from pema.adapter.task import require_task, task_of
from pema.errors import ConfigError, MismatchError
from pema.tasks.registry import get_task

OWN = "Übersetze: {source}"


def config(**values):
    return AdapterConfig(d=6, vocabulary_size=11, rank=2, **values)


def test_an_adapter_says_its_task_and_template():
    own = config(task="translation", template=OWN)
    assert task_of(own) == task_of(own, "translation") == task_of(own, "translation", OWN)
    assert task_of(own) == get_task("translation", OWN)
    require_task(own, task_of(own))


def test_what_the_user_names_counts_and_is_refused_where_it_is_another():
    own = config(task="translation", template=OWN)
    for name, template in ((None, "{source} ="), ("style", None), ("style", OWN), ("translation", "{source} =")):
        chosen = task_of(own, name, template)
        assert chosen == get_task(name or "translation", template)
        with pytest.raises(MismatchError, match=r"the adapter was trained with the (task|template) '.*', not with '"):
            require_task(own, chosen)


def test_a_task_of_the_users_own():
    own = config(task="mine", template=OWN)
    assert (task_of(own).name, task_of(own).template.text) == ("mine", OWN)
    require_task(own, task_of(own))
    with pytest.raises(ConfigError, match="unknown task 'mine'"):
        task_of(own, "mine")


def test_an_adapter_that_records_no_task():
    bare = config()
    with pytest.raises(ConfigError, match="the adapter does not record its task: name it with --task"):
        task_of(bare)
    assert task_of(bare, "style") == get_task("style")
    require_task(bare, get_task("style"))
    require_task(config(task="style"), get_task("style", "{source} ="))
