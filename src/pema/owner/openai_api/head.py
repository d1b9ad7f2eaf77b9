"""The LM head of a proxy over the API's tokens."""

from __future__ import annotations

import contextlib

import torch

from pema.cache import cache_folder
from pema.errors import MismatchError, OwnerError
from pema.files import digest
from pema.owner.contract import PLM
from pema.owner.head import Head
from pema.owner.openai_api.answers import INCOMPLETE
from pema.owner.openai_api.vocabulary import Vocabulary
from pema.tasks.encoding import Encoding

REVISION = 1
"""To be raised when the same proxy and tokenizer get another head."""

AT_ONCE = 16_384


def head_over(vocabulary: Vocabulary, proxy: PLM, tokenizer_fingerprint: str) -> Head:
    """Return W over the API's tokens, from the cache or made now: the row of a token is the mean of its text's rows.

    A token that is one of the proxy's tokens has its row; a token that is no text has the mean of all rows.

    Raises:
        StorageError: the cache cannot be written.
    """
    plm = proxy.description
    made_of = {
        "revision": REVISION,
        "proxy": [plm.fingerprint, plm.head_fingerprint],
        "tokenizer": tokenizer_fingerprint,
        "ends": list(vocabulary.ends),
    }
    folder = cache_folder() / "api" / f"{digest(made_of)[:32]}-head"
    if folder.exists():
        with contextlib.suppress(OwnerError, MismatchError):  # a damaged one is made again
            return Head.load(folder)
    head = _made(vocabulary, proxy)
    head.save(folder)
    return head


@torch.no_grad()
def _made(vocabulary: Vocabulary, proxy: PLM) -> Head:
    head = proxy.head()
    mean = head.weight.float().mean(0)
    encoding = Encoding(proxy.tokenizer)
    pieces: list[tuple[int, ...]] = []
    for start in range(0, len(vocabulary.contents), AT_ONCE):
        texts = [each.decode("utf-8", "replace") for each in vocabulary.contents[start : start + AT_ONCE]]
        pieces += [() if INCOMPLETE in text else ids for text, ids in zip(texts, encoding.encode(texts), strict=True)]
    for end in vocabulary.ends:
        pieces[end] = proxy.description.eos_token_ids[-1:]
    weight = mean.to(head.weight.dtype).repeat(len(pieces), 1)
    bias = None if head.bias is None else head.bias.float().mean().repeat(len(pieces))
    for length in sorted({len(piece) for piece in pieces} - {0}):
        rows = [i for i, piece in enumerate(pieces) if len(piece) == length]
        for start in range(0, len(rows), AT_ONCE):
            part = torch.tensor(rows[start : start + AT_ONCE])
            ids = torch.tensor([pieces[i] for i in part.tolist()])
            weight[part] = head.weight[ids].float().mean(1).to(weight.dtype)
            if bias is not None and head.bias is not None:
                bias[part] = head.bias[ids].float().mean(1)
    return Head(weight, bias, scale=head.scale, soft_cap=head.soft_cap, norm=head.norm, projection=head.projection)
