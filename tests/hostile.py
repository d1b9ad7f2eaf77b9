"""Files written and signed by another party: checksums are right, contents are wrong."""

import contextlib
import hashlib
import json
import os
import struct

from safetensors.torch import load_file, save_file

from pema.files import sha256

BOTTOMLESS = "[" * 200_000 + "]" * 200_000


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit(values, place, value):
    """Set what lies at a place, such as "plm.d" or "shards.0.file"; a callable gets what stands there."""
    *way, last = place.split(".")
    for name in way:
        values = values[int(name) if isinstance(values, list) else name]
    last = int(last) if isinstance(values, list) else last
    values[last] = value(values.get(last) if isinstance(values, dict) else values[last]) if callable(value) else value


def places(values, before=""):
    """Every place in a JSON value."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in items:
        yield f"{before}{name}"
        yield from places(value, f"{before}{name}.")


def sign_manifest(folder, values):
    """Write a manifest with a digest that is right, and counts that are where they can be."""
    values = dict(values)
    for name in ("pairs", "examples"):
        with contextlib.suppress(KeyError, TypeError):
            values[name] = sum(shard[name] for shard in values["shards"])
    values.pop("digest", None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    values["digest"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    (folder / "manifest.json").write_bytes(
        (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    )


def sign_head(folder, content):
    """Write a head bundle's settings with checksums that are right."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    content["tensors_sha256"] = sha256(folder / "head.safetensors")
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "head.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sign_memory(folder):
    """Let the manifest of a memory list its files as they are now."""
    values = read(folder / "manifest.json")
    for entry in (*values["head"], *values["shards"]):
        file = folder / entry["file"]
        entry["bytes"], entry["sha256"] = file.stat().st_size, sha256(file)
    sign_manifest(folder, values)


def sign_adapter(folder, values):
    """Write an adapter's config with the checksum of its weights."""
    values = values | {"model_sha256": sha256(folder / "adapter_model.safetensors")}
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")


def change_tensors(path, change):
    """Rewrite a safetensors file: `change` gets its tensors and may return others."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors = change(tensors) or tensors
    os.unlink(path)  # noqa: PTH108
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def change_header(path, change, length=None):
    """Rewrite the header of a safetensors file; `change` gets it as a dict and may return bytes."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    made = change(header)
    if not isinstance(made, bytes):
        made = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(made) if length is None else length) + made + data[8 + size :])


def device(path):
    """A file that never ends."""
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path):
    """A file that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def sparse(path):
    """A file of a terabyte that takes no room."""
    os.truncate(path, 1 << 40)
