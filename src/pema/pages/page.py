"""A self-contained HTML page: its shell, its colours and its data.

A page loads nothing: its content security policy forbids every request, and allows only the scripts and styles given
to `html_page`, by their hashes. So text from results cannot run, even if it is not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from pema.errors import ConfigError


def html_page(
    title: str, body: str, *, css: Sequence[str] = (), js: Sequence[str] = (), data: object, description: str = ""
) -> str:
    """Build a complete HTML document.

    Args:
        title: plain text; the window's title and the first heading.
        body: HTML after the heading; the caller must escape text in it.
        css: style sheets, after `page.css` with its colours for light and dark.
        js: scripts, in one module after `page.js`, so that a file sees the names of the files before it. They read
            `data` as the constant `DATA`.
        data: JSON-ready values for the scripts; numbers that are not finite become null.
        description: plain text below the heading.

    Raises:
        ConfigError: a style sheet or a script contains the end tag of its element.
    """
    style = "\n".join([static("page.css"), *css])
    script = "\n".join([static("page.js"), *js])
    for kind, text in (("style", style), ("script", script)):
        if f"</{kind}" in text.lower():
            raise ConfigError(f"a {kind} contains '</{kind}', which would end it in the page: escape it.")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    lead = f'\n<p class="lead">{escape(description)}</p>' if description else ""
    document = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="masthead">
<div class="bar"><span class="brand">pema</span></div>
<h1>{escape(title)}</h1>{lead}
</header>
<main id="main">
{body}
</main>
<script type="application/json" id="data">{json_block(data)}</script>
<script type="module">{script}</script>
</body>
</html>
"""
    # A lone surrogate, which JSON allows and UTF-8 does not, becomes a question mark.
    return document.encode("utf-8", "replace").decode("utf-8")


def json_block(data: object) -> str:
    """Return values as JSON that cannot end a script element, whatever text they contain."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def static(name: str) -> str:
    """Read a style sheet or script of this package, such as `report/report.css`."""
    return resources.files("pema.pages").joinpath(name).read_text(encoding="utf-8")


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
