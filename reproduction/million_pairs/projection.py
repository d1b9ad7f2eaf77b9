"""Storage in principal coordinates, as an experiment: representations lose what lies outside of k directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pema.adapter.reconstruction import closed_form
from pema.files import writing
from pema.memory.merge import copy_head
from pema.memory.reader import Memory
from pema.memory.shard import restore, write_shard


def project(memory: Memory, k: int, output: Path) -> Memory:
    """Write a memory with the orthogonal projections of its representations on their k principal directions.

    The coordinates are rounded to the memory's type, as if only these were stored; then they are mapped back to width
    d, so that all that reads a memory reads this one.

    Args:
        memory: a memory in float16.
        k: number of directions, at most d.
        output: folder of the new memory.
    """
    A, B_rct, _ = closed_form(memory.view(), k, memory.d)
    manifest = replace(memory.manifest, shards=(), complete=False)
    with writing(output, private=True) as folder:
        copy_head(memory, folder)
        for shard in memory.shards:
            contents = shard.contents()
            f = restore(contents.representations, contents.scales, contents.channel_scales)
            coordinates = (f @ A.T).to(contents.representations.dtype)
            back = (coordinates.float() @ B_rct.T).to(contents.representations.dtype)
            manifest = manifest.add(
                write_shard(folder, len(manifest.shards), replace(contents, representations=back, agreeing=None))
            )
        manifest.write(folder)
    return Memory.open(output)
