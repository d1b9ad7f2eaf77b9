# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the limits beside the field)
"""Nearest neighbours in an external memory: its representations in a FAISS index, with their targets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from pema.errors import ConfigError, DataError, ExternalMemoryError
from pema.extras import require_library
from pema.files import read_json, recover, seal, unseal, write_json, writing
from pema.memory.manifest import FileEntry
from pema.memory.reader import Memory
from pema.owner.contract import PLMDescription
from pema.schema import from_json, option
from pema.tensors import read_header, save_tensors

FORMAT = "pema-knn"
VERSION = 1
FILE, VECTORS, TARGETS = "index.json", "representations.faiss", "targets.safetensors"
OF_FORMAT = ("format", "version")
AGAIN = "restore it from a backup, or train again."

PROBES = 32
"""Number of cells of an inverted file that a search probes (Khandelwal et al. 2020, section 3)."""

TRAINING_BYTES = 1 << 30
"""Maximum size, in bytes of float32, of the fixed sample from which an index learns its cells or codes."""

ADDED_AT_ONCE = 4096

FEW_QUERIES = 4
"""Up to this number of queries, exact search reads all representations once per query; above it, a matrix product that
reads them once is faster (4 to 6 times with 32 queries, where the representations exceed the cache)."""


@dataclass(frozen=True)
class Neighbours:
    """Nearest pairs of n contexts, nearest first.

    Attributes:
        distances: (n, k) float32, squared L2 distance ||f - f(c_i)||^2; infinite where fewer than k exist.
        targets: (n, k) int64, y_i; 0 where fewer than k exist.
    """

    distances: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Listed:
    """Content of `index.json`, without its format and its digest."""

    index: str = option(line=True, longest=200)
    pairs: int = option(least=1, most=1 << 40)
    plm: PLMDescription = option()
    files: tuple[FileEntry, ...] = option()


class Index:
    """FAISS index of f(c_i) of all pairs of a memory, with y_i at the same positions.

    Attributes:
        factory: the FAISS factory string.
        plm: the PLM that the representations come from.
        targets: (N,) int32.
    """

    def __init__(self, vectors: Any, targets: Tensor, factory: str, plm: PLMDescription) -> None:  # noqa: ANN401
        self._vectors = vectors
        self.factory = factory
        self.plm = plm
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def build(cls, memory: Memory, factory: str) -> Self:
        """Index all pairs of a memory, in its order.

        Args:
            memory: the memory; its representations are the inputs of W_hd.
            factory: `Flat` is exact; the FAISS wiki lists the others, and the number of pairs that each suits.

        Raises:
            ConfigError: FAISS is not installed, or cannot build such an index for this memory.
            ExternalMemoryError: a shard is damaged.
        """
        faiss = faiss_library()
        targets = []
        try:
            vectors = faiss.index_factory(memory.d, factory, faiss.METRIC_L2)
            if not vectors.is_trained:
                most = min(memory.pairs, max(TRAINING_BYTES // (4 * memory.d), 1))
                sample = next(memory.view().batches(most, shuffle_seed=0))
                vectors.train(sample.representations.numpy())
            for batch in memory.view().batches(ADDED_AT_ONCE):
                vectors.add(batch.representations.numpy())
                targets.append(batch.targets.int())
        except RuntimeError as error:
            raise ConfigError(
                f"index={factory!r} does not fit {memory.pairs:,} representations of {memory.d} values: FAISS reports "
                f"{str(error).rpartition('Error: ')[2]!r}. Choose another factory string, or 'Flat'."
            ) from error
        inverted = faiss.try_extract_index_ivf(vectors)
        if inverted is not None:
            inverted.nprobe = min(PROBES, inverted.nlist)
        return cls(vectors, torch.cat(targets), factory, memory.manifest.plm)

    def search(self, f: Tensor, k: int) -> Neighbours:
        """Return the k nearest pairs of each context, or all pairs if there are fewer; in one call of FAISS.

        Args:
            f: (n, d), the inputs of W_hd.
            k: number of neighbours.
        """
        queries = f.detach().to("cpu", torch.float32).contiguous().numpy()
        # FAISS 1.15 changed the unit of its threshold: 0 is below, and the other value above, the size of any call.
        faiss_library().cvar.distance_compute_blas_threshold = 0 if len(queries) > FEW_QUERIES else 2**31 - 1
        distances, indices = self._vectors.search(queries, min(k, len(self)))
        places = torch.from_numpy(indices)
        missing = places < 0
        # With many queries FAISS expands the square, so rounding may turn a distance of 0 into a small number below 0.
        squared = torch.from_numpy(distances).clamp_(min=0).masked_fill_(missing, torch.inf)
        targets = self.targets[places.clamp(min=0)].long().masked_fill_(missing, 0)
        return Neighbours(squared.to(f.device), targets.to(f.device))

    def save(self, folder: Path) -> None:
        """Write the index to `folder`, atomically.

        Raises:
            StorageError: writing failed; an existing folder is unchanged.
        """
        faiss = faiss_library()
        with writing(folder, private=True) as temporary:
            temporary.mkdir()
            with (temporary / VECTORS).open("wb") as file:
                faiss.write_index(self._vectors, faiss.PyCallbackIOWriter(file.write))
            save_tensors({"targets": self.targets}, temporary / TARGETS)
            values: dict[str, Any] = {
                "format": FORMAT,
                "version": VERSION,
                "index": self.factory,
                "pairs": len(self),
                "plm": self.plm.to_dict(),
                "files": [asdict(FileEntry.of(temporary, name)) for name in (VECTORS, TARGETS)],
            }
            write_json(temporary / FILE, seal(values))

    @classmethod
    def load(cls, folder: Path, plm: PLMDescription) -> Self:
        """Read an index written by `save`, for the PLM that it was built with.

        Raises:
            ConfigError: FAISS is not installed.
            ExternalMemoryError: the index is missing, has another format, or a byte of it has changed.
            MismatchError: the index was built with another PLM.
        """
        faiss = faiss_library()
        recover(folder)
        try:
            values = read_json(folder / FILE)
        except DataError as error:
            raise ExternalMemoryError(f"{folder} has no readable kNN-LM index: {error} Train again.") from error
        if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise ExternalMemoryError(
                f"{folder / FILE} has format {values.get('format')!r} version {values.get('version')!r}, but this pema "
                f"reads {FORMAT!r} version {VERSION}: train again."
            )
        try:
            content = unseal(values)
            listed = from_json(_Listed, {name: value for name, value in content.items() if name not in OF_FORMAT})
            if [entry.file for entry in listed.files] != [VECTORS, TARGETS]:
                raise ConfigError(f"it must list the files {VECTORS} and {TARGETS}.")
        except (ConfigError, DataError) as error:
            raise ExternalMemoryError(f"{folder / FILE} is damaged ({str(error).rstrip('.')}): {AGAIN}") from error
        plm.require_same(listed.plm, f"the kNN-LM index {folder}")
        for entry in listed.files:
            path = folder / entry.file
            if not path.is_file():
                raise ExternalMemoryError(f"{path} is missing: {AGAIN}")
            if FileEntry.of(folder, entry.file) != entry:
                raise ExternalMemoryError(f"{path} is damaged (its checksum does not match): {AGAIN}")
        try:
            place = read_header(folder / TARGETS).places.get("targets")
            vectors = faiss.read_index(str(folder / VECTORS))
        except (DataError, RuntimeError) as error:
            raise ExternalMemoryError(f"{folder} is damaged ({error}): {AGAIN}") from error
        if place is None or (place.dtype, place.shape) != ("I32", (listed.pairs,)) or vectors.ntotal != listed.pairs:
            raise ExternalMemoryError(f"{folder} is damaged (it does not contain {listed.pairs:,} pairs): {AGAIN}")
        targets = load_file(folder / TARGETS)["targets"]
        if vectors.d != plm.d or not 0 <= int(targets.min()) <= int(targets.max()) < plm.vocabulary_size:
            raise ExternalMemoryError(f"{folder} is damaged (its pairs are not those of {plm.name}): {AGAIN}")
        return cls(vectors, targets, listed.index, listed.plm)


def faiss_library() -> Any:  # noqa: ANN401
    """Import FAISS and set its number of threads to that of torch.

    Raises:
        ConfigError: FAISS is not installed.
    """
    require_library("knn-lm", "faiss", "knn")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
