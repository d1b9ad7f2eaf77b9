"""What an adapter was taught: its task and template, which it generates with and with no other."""

from __future__ import annotations

from pema.adapter.config import AdapterConfig
from pema.errors import ConfigError, MismatchError
from pema.tasks.registry import TASKS, Task, get_task
from pema.tasks.template import Template


def task_of(config: AdapterConfig, name: str | None = None, template: str | None = None) -> Task:
    """The task of an adapter; what the user names counts, and the adapter says the rest.

    Args:
        config: the adapter's.
        name: the task's name, if the user gives one.
        template: the prompt template, if the user gives one.

    Raises:
        ConfigError: neither names a task.
    """
    chosen = name or config.task
    if chosen is None:
        raise ConfigError("the adapter does not record its task: name it with --task.")
    if template is None and chosen == config.task:
        template = config.template
    if name is None and chosen not in TASKS and template is not None:
        # A task of the user's own; its metrics are not needed to generate.
        return Task(chosen, Template(template), (), "")
    return get_task(chosen, template)


def require_task(config: AdapterConfig, task: Task) -> None:
    """Refuse a task or template that the adapter was not trained with; what it does not record is not checked.

    Raises:
        MismatchError: names both, and the remedy.
    """
    for noun, own, other in (("task", config.task, task.name), ("template", config.template, task.template.text)):
        if own is not None and own != other:
            raise MismatchError(
                f"the adapter was trained with the {noun} {own!r}, not with {other!r}: generate with its own "
                f"(pema.get_task({config.task!r}, {config.template!r}); on the command line neither --task nor "
                "--template), or train an adapter on a memory that was built with the other."
            )
