"""The tokenizer as text files, as it crosses the wire."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pema.errors import OwnerError
from pema.owner.client.received import TOKENIZER_FILES, kept_settings


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What `save_pretrained` writes: file names and their text.

    Raises:
        OwnerError: it is not a fast tokenizer, so what it computes is not in its files but in Python code.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise OwnerError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one: a client could not load it from text files. "
            "Convert it with transformers (tokenizer.json) and serve that folder."
        )
    with tempfile.TemporaryDirectory(prefix="pema-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        there = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
        files = {path.name: path.read_text(encoding="utf-8") for path in there}
    # Where the owner keeps it is the owner's business, and code is not handed out.
    settings = kept_settings(json.loads(files.get("tokenizer_config.json", "{}")))
    return files | {"tokenizer_config.json": json.dumps(settings, ensure_ascii=False)}
