# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the limits beside the field)
"""Nearest neighbours in an external memory: its representations in a FAISS index, their targets beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from pema.errors import ConfigError, DataError, ExternalMemoryError
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
AGAIN = "restore it from a copy, or train again."

PROBES = 32
"""Cells of an inverted file that a search looks into (the paper, section 3)."""

TRAINING_BYTES = 1 << 30
"""float32 representations, at most, that an index which learns its cells or codes learns them from: a fixed sample."""

ADDED_AT_ONCE = 4096

FEW_QUERIES = 4
"""Up to so many queries, exact search reads all representations once for each of them; from there on a matrix product
that reads them once is faster (with 32 queries 4 to 6 times, where they exceed the cache)."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest pairs of n contexts, nearest first.

    Attributes:
        distances: (n, k) float32, squared L2 distance ||f - f(c_i)||^2; infinite where fewer than k were found.
        targets: (n, k) int64, y_i; 0 where fewer than k were found.
    """

    distances: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Listed:
    """`index.json`, its format and its digest apart."""

    index: str = option(line=True, longest=200)
    pairs: int = option(least=1, most=1 << 40)
    plm: PLMDescription = option()
    files: tuple[FileEntry, ...] = option()


class Index:
    """f(c_i) of every pair of a memory in a FAISS index, with y_i at the same places.

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
            memory: where they are; representations are read as W_hd reads them.
            factory: `Flat` is exact; the FAISS wiki says which others there are, and for how many pairs.

        Raises:
            ConfigError: FAISS is not installed, or cannot make such an index of this memory.
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
                f"index={factory!r} does not fit {memory.pairs:,} representations of {memory.d} values: FAISS says "
                f"{str(error).rpartition('Error: ')[2]!r}. Choose another factory string, or 'Flat'."
            ) from error
        inverted = faiss.try_extract_index_ivf(vectors)
        if inverted is not None:
            inverted.nprobe = min(PROBES, inverted.nlist)
        return cls(vectors, torch.cat(targets), factory, memory.manifest.plm)

    def search(self, f: Tensor, k: int) -> Neighbours:
        """The k nearest pairs of each context, or all that there are if they are fewer; in one call of FAISS.

        Args:
            f: (n, d), as W_hd reads them.
            k: how many.
        """
        queries = f.detach().to("cpu", torch.float32).contiguous().numpy()
        # The unit of FAISS's own threshold changed with its version 1.15: 0 is below, and the other above, every call.
        faiss_library().cvar.distance_compute_blas_threshold = 0 if len(queries) > FEW_QUERIES else 2**31 - 1
        distances, places = self._vectors.search(queries, min(k, len(self)))
        found = torch.from_numpy(places)
        missing = found < 0
        # With many queries FAISS expands the square, and a distance of 0 comes out a rounding error below or above it.
        squared = torch.from_numpy(distances).clamp_(min=0).masked_fill_(missing, torch.inf)
        targets = self.targets[found.clamp(min=0)].long().masked_fill_(missing, 0)
        return Neighbours(squared.to(f.device), targets.to(f.device))

    def save(self, folder: Path) -> None:
        """Write the index to `folder`, whole or not at all.

        Raises:
            StorageError: the disk refused; what stood there before is untouched.
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
        """Read an index that `save` wrote, for the PLM that it was built with.

        Raises:
            ConfigError: FAISS is not installed.
            ExternalMemoryError: there is none, it is of another format, or a byte of it has changed.
            MismatchError: it was built with another PLM.
        """
        faiss = faiss_library()
        recover(folder)
        try:
            values = read_json(folder / FILE)
        except DataError as error:
            raise ExternalMemoryError(f"{folder} holds no readable kNN-LM index: {error}") from error
        if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise ExternalMemoryError(
                f"{folder / FILE} is of format {values.get('format')!r} version {values.get('version')!r}, this pema "
                f"reads {FORMAT!r} version {VERSION}: train again."
            )
        try:
            content = unseal(values)
            listed = from_json(_Listed, {name: value for name, value in content.items() if name not in OF_FORMAT})
            if [entry.file for entry in listed.files] != [VECTORS, TARGETS]:
                raise ConfigError(f"it lists other files than {VECTORS} and {TARGETS}.")
        except (ConfigError, DataError) as error:
            raise ExternalMemoryError(f"{folder / FILE} is damaged ({str(error).rstrip('.')}): {AGAIN}") from error
        plm.require_same(listed.plm, f"the kNN-LM index {folder}")
        for entry in listed.files:
            path = folder / entry.file
            if not path.is_file():
                raise ExternalMemoryError(f"{path} is missing: {AGAIN}")
            if FileEntry.of(folder, entry.file) != entry:
                raise ExternalMemoryError(f"{path} is damaged (it is not what was written): {AGAIN}")
        try:
            place = read_header(folder / TARGETS).places.get("targets")
            vectors = faiss.read_index(str(folder / VECTORS))
        except (DataError, RuntimeError) as error:
            raise ExternalMemoryError(f"{folder} is damaged ({error}): {AGAIN}") from error
        if place is None or (place.dtype, place.shape) != ("I32", (listed.pairs,)) or vectors.ntotal != listed.pairs:
            raise ExternalMemoryError(f"{folder} is damaged (it does not hold {listed.pairs:,} pairs): {AGAIN}")
        targets = load_file(folder / TARGETS)["targets"]
        if vectors.d != plm.d or not 0 <= int(targets.min()) <= int(targets.max()) < plm.vocabulary_size:
            raise ExternalMemoryError(f"{folder} is damaged (its pairs are not those of {plm.name}): {AGAIN}")
        return cls(vectors, targets, listed.index, listed.plm)


def faiss_library() -> Any:  # noqa: ANN401
    """FAISS, with as many threads as torch has.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError("knn-lm searches with FAISS, which is not installed: pip install 'pema[knn]'.") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
