"""An adapter on the disk and on the hub, in the layout of a PEFT adapter."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pema.adapter.card import card
from pema.adapter.config import AdapterConfig
from pema.adapter.schedule import Fitted, NamedSchedule
from pema.errors import AdapterError, ConfigError, DataError, StorageError
from pema.files import parse_json, read_json, sha256, write_json, writing
from pema.schema import short
from pema.storage.artifact import Artifact, Part
from pema.storage.fetching import local
from pema.tensors import FLOATS, Place, read_header, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

# torch and the hub's client are imported where they are used: a wrong path is refused before they are loaded.

FORMAT = 2
READ = (1, 2)
"""Formats that can be read. In the first one the fitted schedule is in a file of its own, `schedule.json`."""
CONFIG_FILE = "adapter_config.json"
MODEL_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
SCHEDULE_FILE = "schedule.json"
CONFIG_BYTES = 1 << 22

LARGEST = 1e6
"""Largest plausible weight: trained weights are far smaller, and products of larger ones overflow float32."""

AGAIN = "copy or download it again, or train it again."


def save(config: AdapterConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights, config and model card to `folder`, each atomically, the config last.

    Raises:
        StorageError: writing failed.
    """
    with writing(folder / MODEL_FILE) as temporary:
        save_tensors(tensors, temporary)
        digest = sha256(temporary)
    with writing(folder / CARD_FILE) as temporary:
        temporary.write_text(card(config), encoding="utf-8")
    peft = {
        "peft_type": "PEMA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.plm.name if config.plm else None,
        "inference_mode": True,
        "r": config.rank,
    }
    write_json(folder / CONFIG_FILE, peft | {"format": FORMAT, "model_sha256": digest, "pema": config.to_dict()})


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the file that `save` would write for an adapter's weights."""
    from safetensors.torch import save as serialise

    return hashlib.sha256(serialise({name: t.detach().cpu().contiguous() for name, t in tensors.items()})).hexdigest()


def load(
    name_or_folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read an adapter's config and weights.

    Args:
        name_or_folder: a folder, an address in object storage, or owner/name on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        token: for a private repository.

    Raises:
        AdapterError: there is none, it has another format, or its files do not belong together.
    """
    from safetensors.torch import load_file

    config, path, digest = _open(name_or_folder, revision, token)
    try:
        # Shapes and checksum first: memory is allocated by the config only if the weights have that size.
        _require_fit(read_header(path).places, config, path)
        if sha256(path) != digest:
            raise DataError(f"its SHA-256 is not the one in {CONFIG_FILE}")
        tensors = load_file(path)
    except (DataError, SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}; {AGAIN}") from error
    for name in tensors.keys() - {"tokens"}:
        if not float(tensors[name].abs().max()) <= LARGEST:
            raise AdapterError(f"{path}: {name} contains NaN, infinity or a number beyond {LARGEST:g}; {AGAIN}")
    return config, tensors


def read_config(name_or_folder: str | Path) -> AdapterConfig:
    """Read an adapter's config without its weights.

    Raises:
        AdapterError: there is none, it has another format, or its weights are missing.
    """
    return _open(name_or_folder, None, None)[0]


def require_free(folder: Path) -> None:
    """Refuse a folder that already contains an adapter.

    Raises:
        AdapterError: it contains one.
    """
    if (folder / CONFIG_FILE).exists():
        raise AdapterError(f"{folder} already contains an adapter: train into another folder, or remove it first.")


def _open(name_or_folder: str | Path, revision: str | None, token: str | None) -> tuple[AdapterConfig, Path, object]:
    """Return an adapter's config, the file of its weights and the expected digest of that file."""
    folder = local(name_or_folder, ADAPTER)
    if not folder.is_dir():
        folder = _download(str(name_or_folder), revision, token)
    values = _read_config(folder)
    path = folder / MODEL_FILE
    if not path.is_file():
        raise AdapterError(f"{path} is missing: {AGAIN}")
    try:
        config = AdapterConfig.from_dict(values.get("pema", {}))
        if values["format"] == 1 and (folder / SCHEDULE_FILE).is_file():
            config = _with_schedule(config, folder / SCHEDULE_FILE)
    except (ConfigError, DataError) as error:
        reason = str(error).rstrip(".")
        raise AdapterError(f"{folder} does not contain a readable adapter: {reason}; {AGAIN}") from error
    return config, path, values.get("model_sha256")


def _with_schedule(config: AdapterConfig, path: Path) -> AdapterConfig:
    """Return the config with the schedule of `schedule.json`: the fitted one, or another that a user stored there."""
    schedule = NamedSchedule.from_dict(read_json(path, CONFIG_BYTES))
    if isinstance(schedule, Fitted):
        return replace(config, fitted=schedule)
    return replace(config, schedule=schedule)


def push(
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an adapter to a repository on the hub, which is created if it does not exist.

    Args:
        config: config of the adapter.
        tensors: its weights.
        repo_id: owner/name.
        private: whether a new repository is private.
        revision: branch to upload to.
        token: token of the account; None: the one stored by `hf auth login`.

    Returns:
        The repository's address.

    Raises:
        AdapterError: the hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            save(config, tensors, Path(temporary))
            address = str(api.create_repo(repo_id, private=private, exist_ok=True))
            api.upload_folder(
                repo_id=repo_id, folder_path=temporary, revision=revision, commit_message="Upload the adapter with pema"
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise AdapterError(f"cannot push to {repo_id}: {error}. Log in with `hf auth login`.") from error
    return address


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = read_json(folder / CONFIG_FILE, CONFIG_BYTES)
    except DataError as error:
        raise AdapterError(f"{folder} contains no adapter: {error}") from error
    return _known_format(values, folder)


def _known_format(values: dict[str, Any], folder: Path | str) -> dict[str, Any]:
    """Return the content of `adapter_config.json` if it is an adapter's of a format that can be read."""
    if values.get("peft_type") != "PEMA":
        raise AdapterError(
            f"{folder} contains an adapter of type {short(values.get('peft_type'))}, not PEMA: load it with peft."
        )
    if type(values.get("format")) is not int or values["format"] not in READ:
        raise AdapterError(
            f"the adapter {folder} has format {short(values.get('format'))}, this version reads {FORMAT} and older: "
            "use the version of pema that wrote it."
        )
    return values


def _require_fit(places: Mapping[str, Place], config: AdapterConfig, path: Path) -> None:
    """Refuse missing tensors, unknown tensors and wrong shapes or types."""
    shapes: dict[str, tuple[int, ...]]
    shapes = {"A": (config.rank, config.d), "B_pd": (config.d, config.rank), "B_rct": (config.d, config.rank)}
    copying = {f"copying.{name}": shape for name, shape in config.copying_shapes.items()}
    shapes |= copying
    if "tokens" in places and (places["tokens"].dtype, len(places["tokens"].shape)) != ("I64", 1):
        raise AdapterError(f"{path}: tokens is not a list of 64-bit integers; {AGAIN}")
    own = ["U", "tokens"] if config.vocabulary == "own" else []
    if own and "tokens" in places:
        shapes["U"] = (places["tokens"].shape[0], config.d)
    surplus = set(places) - {*shapes, "tokens"}
    for name in [name for name in shapes if name in places]:
        if places[name].shape != shapes[name]:
            raise AdapterError(f"{path}: {name} is {places[name].shape}, the config says {shapes[name]}; {AGAIN}")
        if places[name].dtype not in FLOATS:
            raise AdapterError(f"{path}: {name} contains {places[name].dtype}, not floating-point numbers; {AGAIN}")
    if surplus or not {"A", "B_pd", *copying, *own} <= set(places):
        named = ", ".join(map(short, sorted(places)))
        expected = ", ".join(["A", "B_pd", *copying, *own])
        raise AdapterError(f"{path}: expected the tensors {expected} (B_rct, tokens), got {named}; {AGAIN}")


def _download(name: str, revision: str | None, token: str | None) -> Path:
    if name.count("/") != 1 or name[0] in "./~":
        raise AdapterError(f"{name} is not a folder with an adapter: check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [CONFIG_FILE, MODEL_FILE, CARD_FILE, SCHEDULE_FILE]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(f"{name} is neither a folder nor an adapter on the hub that can be read: {error}") from error


def _parts(data: bytes, place: str) -> list[Part]:
    try:
        values = _known_format(parse_json(data, "it"), place)
    except DataError as error:
        raise AdapterError(f"{place} contains no adapter: {error}") from error
    if values["format"] != FORMAT:
        raise AdapterError(
            f"{place} contains an adapter of format {values['format']}, which has no checksums: load it from a local "
            "folder, and save it again."
        )
    digest = values.get("model_sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise AdapterError(f"{place} is damaged: model_sha256={short(digest)} is not a SHA-256; {AGAIN}")
    return [Part(MODEL_FILE, digest)]


def _follows(old: bytes, new: bytes) -> bool:
    """Return whether two adapters have the same weights; `pema tune` changes the schedule only."""
    try:
        return _parts(old, "") == _parts(new, "")
    except AdapterError:
        return False


ADAPTER = Artifact(
    name="adapter",
    index=CONFIG_FILE,
    limit=CONFIG_BYTES,
    files=re.compile(rf"{re.escape(MODEL_FILE)}|{re.escape(CARD_FILE)}|training\.jsonl|tensorboard/.+"),
    parts=_parts,
    follows=_follows,
    error=AdapterError,
)
"""An adapter in object storage: its config is the index of its weights."""
