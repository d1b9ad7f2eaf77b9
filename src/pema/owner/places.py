"""A head bundle in object storage: `head.json` is the index of its tensors."""

from __future__ import annotations

import re

from pema.errors import DataError, OwnerError
from pema.files import parse_json
from pema.owner.bundle import SETTINGS_BYTES, SETTINGS_FILE, TENSORS_FILE, parse_bundle
from pema.storage.artifact import Artifact, Part


def _parts(data: bytes, place: str) -> list[Part]:
    try:
        content = parse_json(data, "it")
    except DataError as error:
        raise OwnerError(f"{place} contains no readable head bundle: {error}") from error
    return [Part(TENSORS_FILE, parse_bundle(content, place).tensors_sha256)]


HEAD_BUNDLE = Artifact(
    name="head bundle",
    index=SETTINGS_FILE,
    limit=SETTINGS_BYTES,
    files=re.compile(re.escape(TENSORS_FILE)),
    parts=_parts,
    follows=lambda old, new: False,
    error=OwnerError,
)
