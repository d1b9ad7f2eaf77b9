"""Validation of everything that a PLM owner's server sends, before it is used.

The server is untrusted. Nothing that it sends is executed, no file is written under a name that it chose, and every
value must be a possible answer to the request.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pema.errors import MismatchError, OwnerError
from pema.owner.contract import PLMDescription
from pema.owner.head import Head
from pema.owner.loading import tokenizer_fingerprint

TOKENIZER_BYTES = 1 << 28
"""Maximum total bytes of a tokenizer's files; the largest current tokenizers have 40 MB."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""The files of a fast tokenizer; all of them are data."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

_SETTINGS = (
    "add_prefix_space",
    "added_tokens_decoder",
    "chat_template",
    "clean_up_tokenization_spaces",
    "errors",
    "extra_special_tokens",
    "additional_special_tokens",
    "legacy",
    "model_input_names",
    "model_max_length",
    "model_specific_special_tokens",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)
"""Settings of tokenizer_config.json that are data, in addition to those whose names end in _token. Others name classes,
code or local files (`auto_map`, `tokenizer_class`, `init_inputs`, `gguf_file`, ...), which a server must not choose."""


def kept_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a tokenizer_config.json that are data."""
    return {name: value for name, value in settings.items() if name in _SETTINGS or name.endswith("_token")}


def load_tokenizer(files: object, description: PLMDescription, where: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `where` sent as text files.

    Raises:
        OwnerError: the files are not a tokenizer, or have unexpected names.
        MismatchError: it does not match the description.
    """
    texts = files.get("files") if isinstance(files, dict) else None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise OwnerError(f"{where} sent no tokenizer: expected a JSON object of file names and their texts.")
    for name in texts:
        if not _NAME.fullmatch(name):
            raise OwnerError(f"{where} sent a tokenizer file with the invalid name {ascii(name)[:80]}: refused.")
    if "tokenizer.json" not in texts:
        raise OwnerError(f"{where} sent a tokenizer without tokenizer.json: the owner has to convert it.")
    try:
        settings = kept_settings(json.loads(texts.get("tokenizer_config.json", "{}")))
        texts = texts | {"tokenizer_config.json": json.dumps(settings)}
        with tempfile.TemporaryDirectory(prefix="pema-tokenizer-") as folder:
            for name in TOKENIZER_FILES:
                if name in texts:
                    (Path(folder) / name).write_text(texts[name], encoding="utf-8")
            # The class is fixed: the settings could name any class of transformers.
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            fingerprint = tokenizer_fingerprint(tokenizer)
    except Exception as error:  # tokenizers raises Exception itself, transformers any exception.
        raise OwnerError(f"{where} sent a tokenizer that cannot be loaded ({type(error).__name__}).") from error
    if fingerprint != description.tokenizer_fingerprint:
        raise MismatchError(f"{where} sent a different tokenizer from the one that it describes.")
    return tokenizer


def head_bytes(description: PLMDescription) -> int:
    """Return the maximum bytes of the head of such a PLM, in float32 with all parts."""
    v, d, d_tap = description.vocabulary_size, description.d, description.d_tap
    return 4 * (v * d + v + d * d_tap + 2 * d_tap) + (1 << 20)


def load_head(tensors: Mapping[str, Tensor], texts: Mapping[str, str], description: PLMDescription, where: str) -> Head:
    """Load the head that `where` sent.

    Args:
        tensors: its tensors.
        texts: its settings and its fingerprint.
        description: description of its PLM.
        where: the server, for messages.

    Raises:
        OwnerError: it is not a valid head.
        MismatchError: it does not match the description.
    """
    try:
        settings, fingerprint = json.loads(texts["settings"]), texts["fingerprint"]
    except (ValueError, KeyError, RecursionError) as error:
        raise OwnerError(f"{where} sent an LM head without its settings or its fingerprint.") from error
    try:
        # A masked head's fingerprint is asserted by the owner: it cannot be computed from the tensors.
        head = Head.of(tensors, settings, fingerprint)
    except OwnerError as error:
        raise OwnerError(f"{where}: {error}") from error
    sizes = (head.vocabulary_size, head.d, head.d_tap)
    if head.fingerprint != description.head_fingerprint or sizes != (
        description.vocabulary_size,
        description.d,
        description.d_tap,
    ):
        raise MismatchError(f"{where} sent a different LM head from the one that it describes.")
    return head
