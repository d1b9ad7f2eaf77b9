"""The OpenAPI description beside the messages: bodies that the endpoints read themselves, and errors."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from pema.owner.wire import TENSORS
from pema.serving.messages import ErrorMessage, Message

_MEANINGS = {
    400: "The client left before its request was complete.",
    401: "No API key, or an unknown one.",
    403: "The policy does not allow this key to do that.",
    404: "This key has no such session.",
    408: "The body arrived too slowly.",
    409: "Not the session's next step, nor its last one again.",
    410: "The session was closed: idle for too long, deleted, or it made room for others (code session_expired).",
    412: "The server has another PLM than the one that the header Pema-PLM names.",
    413: "Too much for one request; GET /v1/plm shows the limits.",
    415: "The content type of the body is not application/json.",
    422: "A malformed body, or one that requests what the PLM cannot do.",
    429: "A quota is spent.",
    503: "Loading, stopping, or out of memory.",
}
_RETRY = {"Retry-After": {"description": "Seconds until it may succeed.", "schema": {"type": "integer", "minimum": 1}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document these errors, and those of every endpoint with a key."""
    return only(401, 403, 412, 429, 503, *statuses)


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document these errors."""
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {"application/json": {"schema": _inlined(ErrorMessage.model_json_schema())}},
        }
        | ({"headers": _RETRY} if status in (429, 503) else {})
        for status in sorted(statuses)
    }


def body_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document these errors, and those of every endpoint with a key and a body."""
    return errors(400, 408, 413, 415, 422, *statuses)


def tensors(description: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Document an answer with tensors."""
    content = {TENSORS: {"schema": {"type": "string", "format": "binary"}}}
    return {status: {"description": description, "content": content}}


def text(description: str) -> dict[int | str, dict[str, Any]]:
    """Document an answer in plain text."""
    return {200: {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}}


def body(model: type[Message]) -> dict[str, Any]:
    """Document a request body."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def page(description: dict[str, Any]) -> str:
    """Format an OpenAPI description as one HTML page, without scripts."""
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
    """Return a schema of one level with its definition in place of the reference to it."""
    (definition,) = schema.pop("$defs").values()
    schema["properties"]["error"] = definition
    return schema
