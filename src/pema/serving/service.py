"""A loaded PLM with everything that surrounds it on a server."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pema.owner.contract import PLM, STEP_BUCKET, PLMDescription
from pema.owner.wire import VERSION, WireDtype, identity
from pema.serving.accounts import Account
from pema.serving.batcher import Batcher
from pema.serving.checks import Checks
from pema.serving.heads import PackedHeads
from pema.serving.messages import LimitsMessage, PLMMessage, QuotaMessage
from pema.serving.metrics import Metrics
from pema.serving.pending import PendingBytes
from pema.serving.policy import ANYBODY, CONTEXTS_OF, Policy
from pema.serving.quota import Quota
from pema.serving.refusal import Refusal
from pema.serving.sessions import Cost, Sessions
from pema.serving.store import Store
from pema.serving.tokenizer import tokenizer_files
from pema.serving.views import Views


@dataclass(frozen=True)
class Rules:
    """A policy that was checked against the PLM and can be put into force.

    Attributes:
        policy: the policy.
        views: the PLM as each key sees it, by the key's name.
        checks: what a request may ask of the PLM.
    """

    policy: Policy
    views: Mapping[str, PLM]
    checks: Checks


class Service:
    """Common state of the endpoints.

    Args:
        plm: the PLM in its own coordinates.
        policy: the rules.
        metrics: counts batches and evictions.
        store: the state shared with other processes; by default that of the policy's `quota_file`, or one in memory.
        worker: name of this process among the workers of one server, with which its sessions' names begin.

    Attributes:
        plm: the PLM in its own coordinates.
        policy: the rules in force.
        accounts: the account of each key, by its name.
        checks: what a request may ask of the PLM.
        batcher: the only way to run it.
        sessions: live decoding sessions.
        session_cost: their memory.
        heads: packed LM heads.
        representation_bytes: size of one representation on the network, in the widest precision.
        tokenizer_files: the tokenizer, as it is sent.
        store: the state shared with other processes.

    Raises:
        OwnerError: the tokenizer cannot be sent, or a mask's secret cannot be read.
        ConfigError: the policy asks for what this PLM cannot do, or the store belongs to servers of another PLM.
    """

    def __init__(
        self, plm: PLM, policy: Policy, metrics: Metrics, store: Store | None = None, worker: str = ""
    ) -> None:
        self.plm = plm
        self.store = Store(None if policy.quota_file is None else Path(policy.quota_file)) if store is None else store
        self._replica = secrets.token_hex(8)
        self.report()
        self._views = Views(plm)
        self._quotas: dict[str, Quota] = {}
        self._pending: dict[str, PendingBytes] = {}
        self.accounts: dict[str, Account] = {}
        rules = self.prepare(policy)
        self.tokenizer_files = tokenizer_files(plm.tokenizer)
        self.representation_bytes = 4 * plm.description.d_tap
        self.heads = PackedHeads()
        limits = policy.limits
        self.sessions = Sessions(limits, metrics.eviction, worker=worker)
        self.session_cost = Cost.measure(plm)
        self.batcher = Batcher(
            window=policy.batching.window_ms / 1000,
            tokens=policy.batching.tokens,
            queue=limits.queue_requests,
            seen=metrics.batch,
        )
        self.apply(rules)
        metrics.watch(lambda: self.batcher.waiting, lambda: len(self.sessions), lambda: self.sessions.held)

    def report(self) -> None:
        """Tell the store that this process is alive, and which PLM it has.

        Raises:
            ConfigError: a live process that uses the store has another PLM.
            Refusal: the store is unavailable.
        """
        description = self.plm.description
        self.store.join(self._replica, identity(description), description.name)

    def prepare(self, policy: Policy) -> Rules:
        """Check a policy against the PLM, without changing anything that requests see; may run in any thread.

        Raises:
            OwnerError: a mask's secret cannot be read.
            ConfigError: the policy asks for what this PLM cannot do.
        """
        views = self._views.of(policy.keys or (ANYBODY,), policy)
        return Rules(policy, views, Checks(self.plm.description, policy.limits))

    def apply(self, rules: Rules) -> frozenset[str]:
        """Put rules into force, in the event loop's thread. What keys have spent stays spent.

        Returns:
            The names of the keys that are gone or see the PLM otherwise: their sessions have to be closed.
        """
        policy, limits = rules.policy, rules.policy.limits
        self.policy, self.checks = policy, rules.checks
        accounts = {}
        for key in policy.keys or (ANYBODY,):
            quota = self._quotas.setdefault(key.name, Quota(key, self.store))
            quota.change(key, limits.heads_per_hour)
            pending = self._pending.setdefault(key.name, PendingBytes(limits.pending_bytes))
            pending.most = limits.pending_bytes
            accounts[key.name] = Account(key, rules.views[key.name], quota, pending)
        before, self.accounts = self.accounts, accounts
        self._views.keep(rules.views)
        self.sessions.change(limits, len(accounts))
        self.batcher.change(
            window=policy.batching.window_ms / 1000, tokens=policy.batching.tokens, queue=limits.queue_requests
        )
        same = {name for name, account in accounts.items() if name in before and before[name].plm is account.plm}
        return frozenset(before.keys() - same)

    def close(self) -> None:
        """Close the sessions, and leave the store to the others."""
        self.sessions.close_all()
        with contextlib.suppress(Refusal):
            self.store.leave(self._replica)
        self.store.close()

    @property
    def pending_bytes(self) -> int:
        """Pending bytes of all keys."""
        return sum(pending.held for pending in self._pending.values())

    def description(self, account: Account) -> PLMDescription:
        """Describe the PLM as this key sees it; its context window is what the server allows."""
        return dataclasses.replace(account.plm.description, max_length=self.checks.window)

    def about(self, account: Account) -> PLMMessage:
        """Return the answer to GET /v1/plm."""
        description, key = self.description(account), account.key
        limits = self.policy.limits
        return PLMMessage(
            wire=VERSION,
            description=description.to_dict() | description.accepted(),
            taps=[description.tap] if description.tap in key.taps else [],
            endpoints=list(key.endpoints),
            contexts=[mode for mode in key.contexts if CONTEXTS_OF[mode] in key.endpoints],
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
            requests_per_second=key.requests_per_second,
            quotas=[QuotaMessage(**dataclasses.asdict(rest)) for rest in account.quota.remaining()],
        )
