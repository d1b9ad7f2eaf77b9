"""The masked head: a rotation, known only to the PLM owner, of everything that the PLM returns.

logits = W f = (W Q^T)(Q f) for every orthogonal Q, so a data owner uses Q f and W Q^T exactly like f and W. For what
this protects and what it does not, see docs/masked-head.md.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pema.errors import ConfigError, OwnerError
from pema.files import create
from pema.owner.bundle import MASKED
from pema.owner.contract import BATCH_TOKENS, PLM, ContextRepresentations, PLMDescription, Session
from pema.owner.decoding import DecodesInSessions
from pema.owner.head import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SECRET_BYTES = 32

_ROWS = 4096
"""Number of rows of W_hd rotated at a time, so that no full copy in a wider type exists."""


@dataclass(frozen=True)
class Mask:
    """The PLM owner's secret and everything derived from it; identical on every machine and after every restart.

    Attributes:
        secret: 32 random bytes.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ConfigError(f"a mask's secret has {SECRET_BYTES} bytes, not {len(self.secret)}: use `Mask.create`.")

    @classmethod
    def create(cls, path: Path) -> bool:
        """Draw a secret and store it in a new file that only its owner may read.

        Returns:
            Whether the file was created; False if it existed (it is left unchanged).

        Raises:
            StorageError: the file cannot be written; none is left.
        """
        return not path.exists() and create(path, secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def read(cls, path: Path) -> Mask:
        """Read the mask from a file written by `create`.

        Raises:
            OwnerError: the file does not exist, cannot be read, or contains no secret.
        """
        try:
            secret = path.read_bytes()
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise OwnerError(
                f"the mask's secret {path} does not exist: check the path, or create one with "
                f"`pema release PLM -o HEAD --mask rotation --secret {path}`."
            ) from None
        except OSError as error:
            raise OwnerError(f"the mask's secret {path} cannot be read: {error.strerror or error}.") from error
        if len(secret) != SECRET_BYTES:
            raise OwnerError(
                f"{path} has {len(secret):,} bytes, expected {SECRET_BYTES} for a mask's secret: give the file that "
                "`pema release --mask rotation` wrote (another secret is another mask, and no adapter fits both)."
            )
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("others may read the mask's secret %s: `chmod 600` it.", path)
        return cls(secret)

    def rotation(self, d: int, purpose: str) -> Tensor:
        """Derive Q, uniformly distributed over the orthogonal matrices (Haar measure) for anyone without the secret.

        Q comes from a QR decomposition of Gaussian numbers, with signs that make the diagonal of R positive (Mezzadri
        2007, "How to generate random matrices from the classical compact groups"). The numbers come from SHAKE-256 and
        not from `torch.Generator`, whose 64-bit seed could be found by exhaustive search with a known row of W Q^T.

        Args:
            d: width of the head's input.
            purpose: what is rotated. Each purpose has a separate Q, so that solving for one reveals no other.

        Returns:
            (d, d) float64 on the CPU.
        """
        gaussian = torch.empty(d, d, dtype=torch.float64)
        for i, row in enumerate(gaussian):
            stream = hashlib.shake_256(self.secret + f"rotation {d} {i} {purpose}".encode()).digest(8 * d)
            # 52 bits plus one half: strictly between 0 and 1 in float64, for all bits.
            uniform = ((np.frombuffer(stream, "<u8") >> 12) + 0.5) * 2.0**-52
            torch.special.ndtri(torch.from_numpy(uniform), out=row)
        Q: Tensor
        Q, R = torch.linalg.qr(gaussian)
        return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).double()

    def fingerprint(self, plain: str) -> str:
        """Return a keyed substitute for a fingerprint: it distinguishes PLMs, but does not reveal `plain`."""
        return hmac.new(self.secret, f"fingerprint {plain}".encode(), hashlib.sha256).hexdigest()


class MaskedPLM(DecodesInSessions):
    """A PLM that returns Q f and W_hd Q^T: the same logits, to rounding, in coordinates that only its owner knows.

    Everything is rotated: the head, represented contexts and decoding sessions. Products are computed in float32
    (float64 for a float64 head) and rounded to the type of the input.

    Attributes:
        mask: the secret.
    """

    def __init__(self, plm: PLM, mask: Mask) -> None:
        description, head = plm.description, plm.head()
        if description.tap != "head_input":
            raise ConfigError(
                f"a masked head needs tap 'head_input', but {description.name} is read at {description.tap!r}: the "
                "final norm acts on single coordinates, which a rotation mixes. Use tap 'head_input'."
            )
        for name, part in (("norm", head.norm), ("projection", head.projection)):
            if part is not None:
                raise ConfigError(
                    f"the head of {description.name} has a {name} in front of W_hd, which does not commute with a "
                    "rotation: a masked head needs the input of W_hd itself. Use tap 'head_input'."
                )
        self.mask = mask
        self._plm = plm

    @cached_property
    def description(self) -> PLMDescription:
        """Description of the PLM, with fingerprints that reveal nothing without the secret.

        The plain fingerprint of a public model can be computed by anyone. A fingerprint of the rounded W_hd Q^T would
        depend on the machine that computed it, and an adapter would not survive a move to another machine.
        """
        plain = self._plm.description
        return replace(
            plain,
            fingerprint=self.mask.fingerprint(f"PLM {plain.fingerprint}"),
            head_fingerprint=MASKED + self.mask.fingerprint(f"head {plain.head_fingerprint}"),
            # Another fingerprint gives another rotation, so files made with an earlier one belong to another head.
            earlier=(),
        )

    @cached_property
    def _rotation(self) -> Tensor:
        # Derived when first needed: it takes seconds for a wide PLM, and a server may have masks that nobody uses.
        head = self._plm.head()
        compute = torch.promote_types(head.weight.dtype, torch.float32)
        return self.mask.rotation(head.d, self._plm.description.fingerprint).to(compute)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._plm.tokenizer

    def head(self) -> Head:
        """Return the masked head: W_hd Q^T, with unchanged bias, scale and soft cap; it is kept."""
        return self._head

    @cached_property
    def _head(self) -> Head:
        return self.rotated_head()

    def rotated_head(self) -> Head:
        """Compute the masked head, for a caller that keeps it in another form."""
        head = self._plm.head()
        weight = torch.empty_like(head.weight)
        for masked, plain in zip(torch.split(weight, _ROWS), torch.split(head.weight, _ROWS), strict=True):
            masked.copy_(self._rotate(plain))
        fingerprint = self.description.head_fingerprint
        return Head(weight, head.bias, scale=head.scale, soft_cap=head.soft_cap, fingerprint=fingerprint)

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `teacher` contexts; see `contract.PLM.represent`."""
        return map(self.masked, self._plm.represent(sequences, starts, batch_tokens=batch_tokens, skip=skip))

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `predicted` contexts; see `contract.PLM.predict`."""
        return map(self.masked, self._plm.predict(prompts, steps, batch_tokens=batch_tokens, skip=skip))

    def open_session(self, prompts: Sequence[Sequence[int]]) -> MaskedSession:
        """Open a decoding session; see `contract.PLM.open_session`."""
        return MaskedSession(self._plm.open_session(prompts), self._rotation)

    def masked(self, answer: ContextRepresentations) -> ContextRepresentations:
        """Return an answer of the unmasked PLM as this one gives it."""
        return replace(answer, representations=self._rotate(answer.representations))

    def _rotate(self, x: Tensor) -> Tensor:
        return rotate(x, self._rotation)


class MaskedSession:
    """A decoding session that returns Q f.

    Attributes:
        inner: the session of the unmasked PLM.
    """

    def __init__(self, session: Session, Q: Tensor) -> None:
        self.inner = session
        self._rotation = Q

    @property
    def representations(self) -> Tensor:
        """(rows, d), Q f of every row's current context, on the CPU."""
        return rotate(self.inner.representations, self._rotation)

    @property
    def held_bytes(self) -> int:
        """Bytes that the owner keeps for the session."""
        return self.inner.held_bytes

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Advance the session; see `contract.Session.advance`."""
        self.inner.advance(tokens, parents)

    def close(self) -> None:
        """Close the session; see `contract.Session.close`."""
        self.inner.close()


@torch.no_grad()
def rotate(x: Tensor, Q: Tensor) -> Tensor:
    """Replace every row x_i by Q x_i: (n, d), (d, d) -> (n, d), in the type and on the device of `x`."""
    return (x.to(Q.dtype) @ Q.T.to(x.device)).to(x.dtype)
