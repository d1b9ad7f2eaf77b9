"""Packed LM heads: one per form that the policy gives out, made when first requested."""

from __future__ import annotations

import json
import threading
from collections import deque
from weakref import WeakKeyDictionary, ref

from pema.owner.contract import PLM
from pema.owner.mask import MaskedPLM
from pema.owner.wire import pack

KEPT = 2
"""Number of packed heads that stay in memory after use: each takes as much as W_hd."""


class PackedHead:
    """A head bundle as one safetensors file."""

    def __init__(self, plm: PLM) -> None:
        # A masked PLM keeps the head that it returns; here the packed bytes are the only copy.
        head = plm.rotated_head() if isinstance(plm, MaskedPLM) else plm.head()
        texts = {"settings": json.dumps(head.settings), "fingerprint": head.fingerprint}
        self.content = pack(head.state_dict(), texts)


class PackedHeads:
    """The packed heads of one server, by the PLM whose head it is.

    The `KEPT` last used ones stay, and those that a client still reads: a head is never in memory twice, and a policy
    with a mask per key does not need the memory of all masks at once.
    """

    def __init__(self) -> None:
        self._packing = threading.Lock()
        self._kept: deque[PackedHead] = deque(maxlen=KEPT)
        self._packed: WeakKeyDictionary[PLM, ref[PackedHead]] = WeakKeyDictionary()

    def get(self, plm: PLM) -> PackedHead:
        """Return the head of this PLM, packed; keep a reference to it while it is read."""
        # Simultaneous requests wait for the one that packs.
        with self._packing:
            reference = self._packed.get(plm)
            packed = None if reference is None else reference()
            if packed is None:
                packed = PackedHead(plm)
                self._packed[plm] = ref(packed)
            if packed in self._kept:
                self._kept.remove(packed)
            self._kept.append(packed)
            return packed
