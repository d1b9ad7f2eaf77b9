"""The built-in tasks: name, template and metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pema.errors import ConfigError
from pema.own import is_own, own
from pema.schema import among, short
from pema.tasks.template import Template


@dataclass(frozen=True)
class Task:
    """A task: its prompt template and its metrics.

    Attributes:
        name: the name used on the command line.
        template: the prompt.
        metrics: names of the metrics that `pema.evaluation.evaluate` computes by default.
        description: one line for the help texts.
    """

    name: str
    template: Template
    metrics: tuple[str, ...]
    description: str


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "translation",
            Template("Translate this from English to German: \n{source}\nGerman:"),
            ("bleu", "chrf"),
            "a sentence into another language (the template names the languages: change it for other pairs)",
        ),
        Task(
            "style",
            Template("Convert this informal sentence into a formal sentence: \n{source}\nFormal:"),
            ("bleu", "chrf"),
            "a text into another style, with the same meaning",
        ),
        Task(
            "summarisation",
            Template("Summarise this text: \n{source}\nSummary:"),
            ("rouge1", "rouge2", "rougeL"),
            "a text into a shorter one",
        ),
        Task(
            "qa",
            Template("Answer the question: \n{source}\nAnswer:"),
            ("exact_match", "f1"),
            "a question, or a context, a line break and a question, into its answer",
        ),
        Task(
            "reply",
            Template("{source}"),
            ("bleu", "chrf"),
            "a message, as it is, into a reply: for chat models and conversations",
        ),
        Task(
            "data-to-text",
            Template("Describe this record in one or two sentences: \n{source}\nDescription:"),
            ("bleu", "chrf"),
            "a record of facts into a text that says them",
        ),
        Task(
            "classification",
            Template("Classify this text: \n{source}\nLabel:"),
            ("accuracy",),
            "a text into the name of its class",
        ),
    )
}
"""Every task has a source and a target. In `qa` the source is the question alone, or `context\\nquestion` in one text;
a template such as `"Context and question: \\n{source}\\nAnswer:"` changes the wording, not the number of slots."""


def chosen_task(task: str | Task) -> Task:
    """Return a task that may be given by its name.

    Raises:
        ConfigError: the name is unknown, or it is neither a name nor a task.
    """
    if isinstance(task, str):
        return get_task(task)
    if not hasattr(task, "template"):
        known = ", ".join(TASKS)
        raise ConfigError(f"task={short(task)} is no task: give a name ({known}), or pema.get_task(name, template).")
    return task


def get_task(name: str, template: str | None = None, *, chat: bool | None = None, system: str | None = None) -> Task:
    """Return the task called `name`.

    Args:
        name: name of the task.
        template: text of the prompt, instead of the task's own.
        chat: whether prompts are written as a chat; None: if the PLM's tokenizer has a chat template.
        system: system prompt of the chat.

    `module:attribute` is a `Task` of the user's own; see `pema.own`.

    Raises:
        ConfigError: the name is unknown (the message lists the tasks), it is no task, or the template is invalid.
    """
    if is_own(name):
        task = own(name, "task")
        if not isinstance(task, Task):
            raise ConfigError(f"task {name!r} is {type(task).__name__}, not a pema.tasks.registry.Task: make it one.")
        task = replace(task, name=name)  # the name that finds it again, for adapters and result files
    else:
        among("task", [name], TASKS)
        task = TASKS[name]
    own_form = task.template
    form = Template(
        own_form.text if template is None else template,
        own_form.chat if chat is None else chat,
        own_form.system if system is None else system,
    )
    return replace(task, template=form)
