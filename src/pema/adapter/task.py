"""The task, template and form of prompts of an adapter, and the refusal of any other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pema.adapter.config import AdapterConfig
from pema.errors import ConfigError, MismatchError
from pema.schema import short
from pema.tasks.chat import has_chat_template
from pema.tasks.registry import TASKS, Task, get_task
from pema.tasks.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_of(
    config: AdapterConfig,
    name: str | None = None,
    template: str | None = None,
    *,
    chat: bool | None = None,
    system: str | None = None,
) -> Task:
    """Return the task of an adapter, with what the user names instead of the adapter's own.

    Args:
        config: config of the adapter.
        name: name of the task, if the user gives one.
        template: text of the prompt, if the user gives one.
        chat: whether prompts are written as a chat, if the user says so.
        system: system prompt of the chat, if the user gives one.

    Raises:
        ConfigError: neither the user nor the adapter names a task.
    """
    chosen = name or config.task
    if chosen is None:
        raise ConfigError("the adapter does not record its task: name it with --task.")
    if template is None and chosen == config.task:
        template = config.template
    if chat is None and system is None and config.template is not None:
        chat = config.chat_template is not None
    if chat is not False and system is None:
        system = config.system
    if name is None and chosen not in TASKS and template is not None:
        # A task of the user's own; its metrics are not needed to generate.
        return Task(chosen, Template(template, chat, system), (), "")
    return get_task(chosen, template, chat=chat, system=system)


def require_task(config: AdapterConfig, task: Task, tokenizer: PreTrainedTokenizerBase | None = None) -> Task:
    """Refuse a task, template or form of prompts that the adapter was not trained with.

    What the adapter does not record is not checked. What the task leaves open is the adapter's own.

    Args:
        config: config of the adapter.
        task: the task to generate for.
        tokenizer: the PLM's tokenizer; with it, another chat template is refused.

    Returns:
        The task, with the adapter's own choice between chat and plain prompts, and its system prompt.

    Raises:
        MismatchError: the two differ; the message names both, and the remedy.
    """
    remedy = (
        f"generate with its own (pema.get_task({config.task!r}, {config.template!r}); on the command line neither "
        "--task nor --template), or train an adapter on a memory that was built with the other."
    )
    for noun, own, other in (("task", config.task, task.name), ("template", config.template, task.template.text)):
        if own is not None and own != other:
            raise MismatchError(f"the adapter was trained with the {noun} {own!r}, not with {other!r}: {remedy}")
    if config.template is None:
        return task
    chat, template = config.chat_template is not None, task.template
    remedy = "leave out --chat, --no-chat and --system (in Python chat and system), or train another adapter."
    if template.chat is not None and template.chat != chat:
        forms = {True: "a chat", False: "plain prompts"}
        raise MismatchError(f"the adapter was trained with {forms[chat]}, not with {forms[not chat]}: {remedy}")
    if template.system is not None and template.system != config.system:
        own = "without a system prompt" if config.system is None else f"with the system prompt {short(config.system)}"
        raise MismatchError(f"the adapter was trained {own}, not with {short(template.system)}: {remedy}")
    template = replace(template, chat=chat, system=config.system)
    if tokenizer is not None and chat:
        _require_chat_template(config, template, tokenizer)
    return replace(task, template=template)


def _require_chat_template(config: AdapterConfig, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    digest = template.chat_template(tokenizer) if has_chat_template(tokenizer) else None
    if digest != config.chat_template:
        other = "has none" if digest is None else f"has {digest[:12]}"
        raise MismatchError(
            f"the adapter was trained with the chat template {str(config.chat_template)[:12]} (SHA-256), but the PLM's "
            f"tokenizer {other}: put that template into the PLM's folder (chat_template.jinja), or train another "
            "adapter."
        )
