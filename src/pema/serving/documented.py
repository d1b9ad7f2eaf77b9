"""What the OpenAPI description says beside the messages: bodies that the endpoints read themselves, and errors."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from pema.owner.wire import TENSORS
from pema.serving.messages import ErrorMessage, Message

_MEANINGS = {
    400: "The client left before its request was complete.",
    401: "No API key, or one that is not known here.",
    403: "The policy does not let this key do that.",
    404: "This key has no such session.",
    408: "The body came too slowly.",
    409: "Not the session's next step, nor its last one again.",
    410: "The session was closed: idle for too long, deleted, or it made room for others (code session_expired).",
    413: "More than one request may carry; GET /v1/plm tells the limits.",
    415: "The body is not sent as application/json.",
    422: "A body that is malformed, or that asks for what the PLM cannot do.",
    429: "A quota is spent.",
    503: "Loading, about to stop, or no room.",
}
_RETRY = {"Retry-After": {"description": "Seconds until it may succeed.", "schema": {"type": "integer", "minimum": 1}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documented error answers: these, and those that every endpoint with a key may give."""
    return only(401, 403, 429, 503, *statuses)


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documented error answers."""
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {"application/json": {"schema": _inlined(ErrorMessage.model_json_schema())}},
        }
        | ({"headers": _RETRY} if status in (429, 503) else {})
        for status in sorted(statuses)
    }


def body_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documented error answers of an endpoint that reads a body."""
    return errors(400, 408, 413, 415, 422, *statuses)


def tensors(description: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """A documented answer that carries tensors."""
    content = {TENSORS: {"schema": {"type": "string", "format": "binary"}}}
    return {status: {"description": description, "content": content}}


def text(description: str) -> dict[int | str, dict[str, Any]]:
    """A documented answer in plain text."""
    return {200: {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}}


def body(model: type[Message]) -> dict[str, Any]:
    """A documented request body."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def page(description: dict[str, Any]) -> str:
    """An OpenAPI description as one HTML page, without scripts."""
    parts = [f"<h1>{escape(description['info']['title'])} {escape(description['info']['version'])}</h1>"]
    parts.append(f"<p>{escape(description['info']['description'])}</p>")
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                text = escape(json.dumps(body, indent=2, ensure_ascii=False))
                parts.append(f"<details><summary>Body</summary><pre>{text}</pre></details>")
            answers = ((status, answer["description"]) for status, answer in operation["responses"].items())
            lines = "".join(f"<dt>{escape(status)}</dt><dd>{escape(what)}</dd>" for status, what in answers)
            parts.append(f"<dl>{lines}</dl>")
    style = "body{font:16px/1.4 sans-serif;max-width:56em;margin:2em auto}dt{font-weight:bold}"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>PEMA server</title><style>{style}</style>"
    return head + "".join(parts)


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of one level with its definition put in place of the reference to it."""
    (definition,) = schema.pop("$defs").values()
    schema["properties"]["error"] = definition
    return schema
