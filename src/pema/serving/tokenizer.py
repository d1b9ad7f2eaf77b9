"""The tokenizer as text files, as it is sent."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pema.errors import OwnerError
from pema.owner.client.received import TOKENIZER_FILES, kept_settings


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the files that `save_pretrained` writes, as texts by name.

    Raises:
        OwnerError: it is not a fast tokenizer, so its behaviour is not in its files but in Python code.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise OwnerError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one: a client could not load it from text files. "
            "Convert it with transformers (tokenizer.json) and serve that folder."
        )
    with tempfile.TemporaryDirectory(prefix="pema-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        paths = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
        files = {path.name: path.read_text(encoding="utf-8") for path in paths}
    # The owner's paths are private, and code is not sent.
    settings = kept_settings(json.loads(files.get("tokenizer_config.json", "{}")))
    return files | {"tokenizer_config.json": json.dumps(settings, ensure_ascii=False)}
