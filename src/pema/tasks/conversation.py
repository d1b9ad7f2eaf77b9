"""Conversations: every reply of the assistant becomes an example.

The turns are objects of OpenAI's form (`role`, `content`) or of ShareGPT's (`from`, `value`). A reply's source is the
turn of the user before it, its history the turns before that one. As with OpenAI's service and TRL:

- several turns of the user in a row stay separate turns; the last one is the source;
- a turn of the assistant before the first one of the user is part of the history, not an example;
- turns after the last reply are not used;
- a reply with `weight: 0` is part of the history of later ones, not an example.

A reply that follows another reply or a turn of the system has no source, so it is refused, and so is everything that is
not text: tools and their calls, images, sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pema.errors import DataError
from pema.tasks.example import Example, Role, Turn
from pema.tasks.values import Row, is_missing, kind_of, listed, text_of

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
OF_A_ROW = ("tools", "functions", "images", "image", "videos", "audios")
"""Fields beside the turns that change a conversation and are not supported."""

OF_A_TURN = ("tool_calls", "function_call", "tool_call_id", "audio", "images", "reasoning_content", "thinking")
"""The same inside a turn."""

LEAVE_OUT = "pema reads conversations of texts only: leave this one out, or write the turn as a text."


def conversation(row: Row, field: str, where: str) -> list[Example]:
    """Return an example for every reply of a conversation.

    Args:
        row: `field` contains the turns; `system`, if there is one, a text that comes before them.
        field: the name of the field.
        where: file and line, for the messages.

    Raises:
        DataError: a turn is malformed or not text, a reply has no source, or there is no reply.
    """
    turns, learned = read_turns(row, field, where)
    if _is_given(row.get("system")):
        turns, learned = [Turn("system", text_of(row["system"], "system", where)), *turns], [False, *learned]
    return replies(turns, learned, where)


def read_turns(row: Row, field: str, where: str) -> tuple[list[Turn], list[bool]]:
    """Read the turns in a field, and whether each is to be learned.

    Raises:
        DataError: the field is not a list of turns, or something is not text.
    """
    for name in OF_A_ROW:
        if _is_given(row.get(name)):
            raise DataError(f"{where}: {name!r} is not supported. {LEAVE_OUT}")
    values = row[field]
    if not isinstance(values, list | tuple) and not hasattr(values, "tolist"):
        example = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        raise DataError(f"{where}: {field!r} is {kind_of(values)}, not a list of turns such as {example}.")
    turns, learned = [], []
    for i, value in enumerate(values, start=1):
        turn, weight = _turn(value, f"{where}, turn {i}")
        turns.append(turn)
        learned.append(weight)
    return turns, learned


def replies(turns: list[Turn], learned: list[bool], where: str) -> list[Example]:
    """Return an example for every turn of the assistant that is to be learned.

    Raises:
        DataError: a reply does not follow a turn of the user, or there is none.
    """
    examples, asked = [], False
    for i, turn in enumerate(turns):
        asked |= turn.role == "user"
        if turn.role != "assistant" or not asked:
            continue
        before = turns[i - 1]
        if before.role != "user":
            raise DataError(
                f"{where}, turn {i + 1}: a reply must follow a turn of the user, but turn {i} has the role "
                f"{before.role!r}. Join the two turns, or change their order."
            )
        if learned[i]:
            history = tuple(turns[: i - 1])
            examples.append(Example(before.content, turn.content, f"{where}, turn {i + 1}", history))
    if not examples:
        roles = listed(turn.role for turn in turns)
        raise DataError(
            f"{where}: there is no reply to learn from (the roles are {roles}): the assistant must answer the user at "
            "least once, with a weight that is not 0. Add a reply or leave the conversation out."
        )
    return examples


def _turn(value: Any, where: str) -> tuple[Turn, bool]:  # noqa: ANN401 - untrusted input
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {kind_of(value)}, not an object with 'role' and 'content'.")
    names = next((pair for pair in (("role", "content"), ("from", "value")) if pair[0] in value), None)
    if names is None:
        raise DataError(f"{where} has no 'role' (or 'from'); it contains {listed(value)}.")
    role = value[names[0]]
    if role in TOOL_ROLES:
        raise DataError(f"{where} is one of a tool ({names[0]} {role!r}). {LEAVE_OUT}")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: unknown {names[0]} {role!r}: use {', '.join(ROLES)}.")
    for name in OF_A_TURN:
        if _is_given(value.get(name)):
            raise DataError(f"{where} contains {name!r}. {LEAVE_OUT}")
    weight = value.get("weight")
    if not is_missing(weight) and weight not in (0, 1):
        raise DataError(f"{where}: weight {weight!r} must be 0 (do not learn this reply) or 1.")
    text = _content(value.get(names[1]), names[1], where)
    if ROLES[role] != "system" or text != "":
        text = text_of(text, names[1], where)
    return Turn(ROLES[role], text), weight != 0


def _is_given(value: Any) -> bool:  # noqa: ANN401 - untrusted input
    return not is_missing(value) and bool(len(value) if hasattr(value, "__len__") else value)


def _content(value: Any, name: str, where: str) -> Any:  # noqa: ANN401 - untrusted input
    """Join the parts of a content that is a list of texts."""
    if not isinstance(value, list | tuple):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise DataError(f"{where} contains a part of type {kind!r}. {LEAVE_OUT}")
    return "".join(text_of(part.get("text"), f"{name}.text", where) for part in value)
