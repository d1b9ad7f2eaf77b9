"""Planning of a build: what is requested from the PLM for each example, and which examples share a shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pema.memory.config import Targets
from pema.memory.encoding import Tokens
from pema.memory.manifest import ITEM_BYTES, Manifest
from pema.memory.shard import Integers
from pema.owner.contract import padded

SHARD_BYTES = 1 << 27
"""Maximum size of a group's representations, so that wide PLMs do not fill the RAM."""


@dataclass(frozen=True)
class Plan:
    """The requests of a build. They depend on the input and the settings only, not on what is already done.

    Attributes:
        contexts: number of contexts requested for each example, (examples,); in `predicted` mode the steps.
        tokens: number of tokens requested for each example, steps included, (examples,).
        done: number of examples whose shards are written.
        examples_per_shard: maximum number of examples of a group.
        row_bytes: size of one stored representation.
    """

    contexts: Integers
    tokens: Integers
    done: int
    examples_per_shard: int
    row_bytes: int

    @classmethod
    def of(cls, manifest: Manifest, tokens: Tokens, max_length: int) -> Plan:
        """Plan the last input of a manifest, for a PLM whose contexts have at most `max_length` tokens."""
        prompts = tokens.cuts - tokens.starts[:-1]
        # The PLM owner sees the group sizes, so they must not reveal more about the targets than the requests do.
        contexts = tokens.target_lengths
        if manifest.contexts == "predicted":
            wanted = [steps_for(int(length), manifest.targets) for length in tokens.target_lengths]
            contexts = np.minimum(np.array(wanted, np.int64), max_length - prompts)
        return cls(
            contexts=contexts,
            tokens=np.diff(tokens.starts) if manifest.contexts == "teacher" else prompts + contexts,
            done=manifest.examples - sum(entry.examples for entry in manifest.inputs[:-1]),
            examples_per_shard=manifest.inputs[-1].examples_per_shard,
            row_bytes=manifest.plm.d_tap * ITEM_BYTES[manifest.dtype],
        )

    def groups(self) -> Iterator[range]:
        """Yield the groups of examples whose shards are not written; a group depends only on its start."""
        first = self.done
        while first < len(self.contexts):
            filled = np.cumsum(self.contexts[first : first + self.examples_per_shard]) * self.row_bytes
            count = max(1, int(np.searchsorted(filled, SHARD_BYTES, side="right")))
            yield range(first, first + count)
            first += count


def steps_for(length: int, targets: Targets) -> int:
    """Return the number of generation steps for a target of `length` tokens.

    "aligned" and "matched" add a quarter of the target length, so that the adapter learns to end a text that has become
    too long.
    The result is rounded up, so that the PLM owner learns the target length only approximately.
    """
    wanted = length if targets == "position" else length + length // 4
    return padded(wanted)
