"""How much of the text of a memory comes back from its representations alone, without the token ids beside them.

    python -m reproduction.experiments.inversion

A memory of restaurants (bundled data, `teacher` contexts) is built and attacked by someone who has the folder, whose
head gives the likeliest next tokens, and the PLM: of the candidates for y_i that one is chosen after which the PLM's
own representation is nearest to the stored f(c_{i+1}). Results go to `reproduction/results/inversion.jsonl`.

The token ids of targets and prompts are in the folder too, in plain; they are used for scoring only.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pema.experiments.data import Data, restaurant_data
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.head import Head
from pema.owner.local import LocalPLM
from pema.signature import signature
from pema.tasks.example import Example
from pema.tasks.registry import Task, get_task
from reproduction.lines import put_run
from reproduction.tables.privacy import INVERSION

CANDIDATES = 48
"""Number of the likeliest tokens that are tried at once."""

MOST = 16 * CANDIDATES
"""Number of tokens that are tried at most if none comes near, by someone who knows the prompt."""

NEAR = 0.05
"""Distance, as a share of |f|, below which a context is taken for the stored one."""

SHARPNESS = 30.0
"""Weight of the distance against log P of the token: of 30 and 1,000 the better one on four texts of E2E's dev set."""

Texts = list[list[int]]


def stored_texts(memory: Memory) -> tuple[list[Tensor], Texts]:
    """Return the representations of each example, (n, d), in the order of its tokens, and its target tokens."""
    (batch,) = memory.view().batches(memory.pairs)
    starts = (batch.steps == 0).nonzero()[:, 0].tolist()
    lengths = torch.tensor([*starts, len(batch.steps)]).diff().tolist()
    targets = [part.tolist() for part in torch.split(batch.targets, lengths)]
    return list(torch.split(batch.representations.float(), lengths)), targets


def log_p(head: Head, f: Tensor) -> Tensor:
    """Return log P_LM of the next token, (n, V), after representations (n, d)."""
    return head.logits(f.to(head.weight.dtype)).float().log_softmax(-1)


def likeliest(head: Head, stored: Tensor) -> list[int]:
    """Return what the folder alone tells without its token ids: the likeliest token after each representation."""
    return [int(token) for token in log_p(head, stored).argmax(-1)]


def represent(plm: LocalPLM, contexts: Sequence[Sequence[int]]) -> Tensor:
    """Return f of each context, (n, d)."""
    session = plm.open_session(contexts)
    try:
        return plm.head().normalise(session.representations).float()
    finally:
        session.close()


def distances(representations: Tensor, goal: Tensor) -> Tensor:
    """Return the distance of each of (n, d) from `goal`, as a share of the latter's norm."""
    away: Tensor = torch.linalg.vector_norm(representations - goal, dim=-1) / torch.linalg.vector_norm(goal)
    return away


def recover(plm: LocalPLM, stored: Tensor, prompt: Sequence[int], *, known: bool) -> list[int]:
    """Recover the target tokens of an example from its representations.

    Args:
        plm: the PLM.
        stored: (n, d), f of the contexts before each of the n tokens.
        prompt: the attacker's prompt.
        known: whether it is the example's own prompt. Then f of the right context is the stored one, so the attacker
            sees whether a token is right, and tries further ones if none is.
    """
    text: list[int] = []
    proposals = log_p(plm.head(), stored)
    for scores, goal in zip(proposals[:-1], stored[1:], strict=True):
        order = scores.topk(min(MOST if known else CANDIDATES, len(scores))).indices
        best, chosen = -torch.inf, int(order[0])
        for some in torch.split(order, CANDIDATES):
            away = distances(represent(plm, [[*prompt, *text, token] for token in some.tolist()]), goal)
            values = scores[some] - SHARPNESS * away
            if float(values.max()) > best:
                best, chosen = float(values.max()), int(some[values.argmax()])
            if float(away.min()) < NEAR:
                chosen = int(some[away.argmin()])
                break
        else:
            # The right token is not among those tried, so from here on no context will be the right one.
            known = False
        text.append(chosen)
    # No representation follows the last token.
    return [*text, int(proposals[-1].argmax())]


def share(recovered: Texts, targets: Texts) -> float:
    """Return the share of target tokens that are recovered, at their places."""
    pairs = [a == b for one, two in zip(recovered, targets, strict=True) for a, b in zip(one, two, strict=True)]
    return sum(pairs) / len(pairs)


def attack(plm: LocalPLM, task: Task, victims: Sequence[Example], own: Sequence[Example]) -> dict[str, Any]:
    """Attack the memory of `victims`.

    Args:
        plm: the PLM.
        task: the task, whose template the attacker knows.
        victims: the examples of the memory.
        own: examples of the attacker: one gives the prompt in place of the unknown ones, all give sources among which
            those of the victims are sought.
    """
    with tempfile.TemporaryDirectory() as folder:
        memory = build_memory(plm, list(victims), task, Path(folder) / "memory")
        stored, targets = stored_texts(memory)
        dtype = memory.manifest.dtype
    prompts = [list(each.prompt) for each in task.template.encode_prompts(plm.tokenizer, [*victims, *own])]
    head, other = plm.head(), prompts[-1]
    sources = represent(plm, prompts)
    nearest = torch.stack([distances(sources, f[0]).argmin() for f in stored])
    alone = [likeliest(head, f) for f in stored]
    unknown = [recover(plm, f, other, known=False) for f in stored]
    known = [recover(plm, f, prompt, known=True) for f, prompt in zip(stored, prompts, strict=False)]
    decode = plm.tokenizer.decode
    return {
        "examples": len(stored),
        "tokens": sum(map(len, targets)),
        "dtype": dtype,
        "head_alone": share(alone, targets),
        "prompt_unknown": share(unknown, targets),
        "prompt_known": share(known, targets),
        "whole_texts": sum(a == b for a, b in zip(known, targets, strict=True)),
        "sources": len(prompts),
        "sources_identified": int((nearest == torch.arange(len(stored))).sum()),
        "texts": [
            {"target": decode(y), "prompt_unknown": decode(a), "prompt_known": decode(b)}
            for y, a, b in zip(targets[:3], unknown, known, strict=False)
        ],
    }


def run(plm: LocalPLM, data: Data, count: int) -> dict[str, Any]:
    """Attack a memory of `count` test examples; the attacker's own examples are the dev examples."""
    task = get_task(data.task)
    # Each example of the memory has one target.
    victims, own = ([Example(e.source, e.target) for e in part] for part in (data.test[:count], data.dev))
    result = attack(plm, task, victims, own)
    facts = {"plm": plm.description.to_dict(), "data": data.name, "data_sha256": data.digest(), "examples": count}
    return result | {"signature": signature(facts, 0)}


def main() -> None:
    """Attack, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=8, help="number of examples in the memory")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(LocalPLM.load("smollm2-135m", dtype="bfloat16"), restaurant_data(), args.examples)
    put_run(INVERSION, "smollm2-135m", result)
    print(result)


if __name__ == "__main__":
    main()
