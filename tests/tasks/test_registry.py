import re

import pytest

from pema.errors import ConfigError
from pema.tasks.registry import TASKS, get_task


def test_the_tasks_by_name():
    assert list(TASKS) == ["translation", "style", "summarisation", "qa", "reply", "data-to-text", "classification"]
    for name, task in TASKS.items():
        assert task.name == name
        assert task.metrics
        assert task.description
        assert get_task(name) == task


def test_the_translation_prompt_is_the_one_that_the_plm_was_trained_on():
    assert get_task("translation").template.text == "Translate this from English to German: \n{source}\nGerman:"


def test_a_template_of_the_users_own():
    task = get_task("qa", "Q: {source} A:")
    assert task.template.text == "Q: {source} A:"
    assert task.metrics == TASKS["qa"].metrics
    assert get_task("qa").template.text != task.template.text


def test_an_unknown_task_is_refused_with_the_known_ones():
    names = "translation, style, summarisation, qa, reply, data-to-text or classification"
    words = f"unknown task 'translate': use {names} (did you mean 'translation'?)."
    with pytest.raises(ConfigError, match=re.escape(words)):
        get_task("translate")


def test_a_template_without_slot_is_refused():
    with pytest.raises(ConfigError, match="write it exactly once"):
        get_task("qa", "no slot")
