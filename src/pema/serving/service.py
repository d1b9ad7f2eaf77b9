"""A loaded PLM with all that stands around it on a server."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import get_args

from pema.owner.contract import PLM, STEP_BUCKET, PLMDescription
from pema.owner.wire import VERSION, WireDtype, pack
from pema.serving.batcher import Batcher
from pema.serving.checks import Checks
from pema.serving.messages import LimitsMessage, PLMMessage
from pema.serving.metrics import Metrics
from pema.serving.pending import PendingBytes
from pema.serving.policy import ANYBODY, HeadForm, Key, Policy
from pema.serving.quota import Quota
from pema.serving.sessions import Cost, Sessions
from pema.serving.tokenizer import tokenizer_files
from pema.serving.views import views


class Service:
    """What the endpoints work with.

    Attributes:
        policy: what is allowed.
        plms: the PLM for each form that its head is given out in.
        checks: what a request may ask of it.
        batcher: the one way to run it.
        sessions: live decoding sessions.
        session_cost: what they hold.
        quotas: what each key has left, by its name.
        pending: what is held of each key's requests and answers.
        representation_bytes: that one representation takes on its way, in the widest precision.
        tokenizer_files: the tokenizer, as it crosses.

    Raises:
        OwnerError: the tokenizer cannot be handed out.
        ConfigError: the policy asks for what this PLM cannot do.
    """

    def __init__(self, plm: PLM, policy: Policy, metrics: Metrics) -> None:
        self.policy = policy
        self.plms = views(plm, policy)
        self._descriptions = {form: view.description for form, view in self.plms.items()}
        self.checks = Checks(plm.description, policy.limits)
        self.tokenizer_files = tokenizer_files(plm.tokenizer)
        keys, limits = policy.keys or (ANYBODY,), policy.limits
        self.quotas = {key.name: Quota(key, heads_per_hour=limits.heads_per_hour) for key in keys}
        self.pending = {key.name: PendingBytes(limits.pending_bytes) for key in keys}
        self.representation_bytes = 4 * plm.description.d_tap
        self._heads: dict[HeadForm, bytes] = {}
        self._packing = threading.Lock()
        self.sessions = Sessions(limits, metrics.eviction, keys=len(keys))
        self.session_cost = Cost.measure(plm)
        self.batcher = Batcher(
            window=policy.batching.window_ms / 1000,
            tokens=policy.batching.tokens,
            queue=policy.limits.queue_requests,
            seen=metrics.batch,
        )
        metrics.watch(lambda: self.batcher.waiting, lambda: len(self.sessions), lambda: self.sessions.held)

    def description(self, key: Key) -> PLMDescription:
        """The PLM as this key sees it; its context window is what the server allows."""
        return dataclasses.replace(self._descriptions[key.head], max_length=self.checks.window)

    def head(self, key: Key) -> bytes:
        """The head bundle in the form that this key is given, as a safetensors file; packed once."""
        # Requests that come together wait for the one that packs.
        with self._packing:
            if key.head not in self._heads:
                head = self.plms[key.head].head()
                texts = {"settings": json.dumps(head.settings), "fingerprint": head.fingerprint}
                self._heads[key.head] = pack(head.state_dict(), texts)
            return self._heads[key.head]

    def about(self, key: Key) -> PLMMessage:
        """What GET /v1/plm answers."""
        description = self.description(key)
        limits = self.policy.limits
        return PLMMessage(
            wire=VERSION,
            description=description.to_dict() | description.accepted(),
            taps=[description.tap] if description.tap in key.taps else [],
            contexts=list(key.contexts),
            head=key.head,
            dtypes=list(get_args(WireDtype)),
            limits=LimitsMessage(
                body_bytes=limits.body_bytes,
                sequence_tokens=self.checks.window,
                batch_sequences=limits.batch_sequences,
                batch_tokens=limits.batch_tokens,
                sessions=limits.sessions,
                session_rows=limits.session_rows,
                predict_bucket=STEP_BUCKET,
            ),
        )
