"""The masked head on real data: the quality of adapters (unchanged), and how well it hides the embedding table.

    python -m reproduction.experiments.masked_head DATA -o runs/masked_head

DATA contains the folder `cocoa-mt-en-de`; without it the customer-support sentences are used. Both presets are
trained on teacher contexts of the embedded PLM, plain and masked, each seed with its own mask. Results go to
`reproduction/results/masked_head.jsonl`; finished ones are kept.

A masked adapter is rotated back for generation, which does not change P_PEMA (`unmasked`): then the plain PLM in the
process gives the same texts as a decoding session of the masked PLM.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pema.adapter.module import Adapter
from pema.adapter.presets import preset as preset_of
from pema.adapter.training import train
from pema.evaluation.evaluate import evaluate
from pema.evaluation.perplexity import perplexity
from pema.experiments.data import Data, support_data
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.owner.contract import PLM, PLMDescription
from pema.owner.local import LocalPLM
from pema.owner.mask import Mask, MaskedPLM, rotate
from pema.signature import signature
from pema.tasks.example import Example
from pema.tasks.registry import get_task
from reproduction.data.real import cocoa
from reproduction.lines import put_run, read_runs
from reproduction.tables.privacy import MASKED_HEAD as RESULTS

KNOWN = (20, 40, 80, 160, 320)  # rows of the true table that someone knows already; d is 320
KEPT = ("start_cross_entropy", "held_out_cross_entropy", "best_epoch", "epochs", "train_seconds")


def published_mask(seed: int) -> Mask:
    """Return a mask with a public secret, so that the figures can be reproduced; it hides nothing."""
    # The name of this module when the masks were first drawn: another name would give other masks.
    return Mask(hashlib.sha256(f"recipes.masked_head {seed}".encode()).digest())


def unmasked(adapter: Adapter, Q: Tensor, description: PLMDescription) -> Adapter:
    """Return the adapter that maps f as `adapter` maps Q f, with the result rotated back.

    A (Q f) = (A Q) f and W_hd Q^T (B_pd z) = W_hd (Q^T B_pd) z; the norm of f, which gelu adapters divide by, is that
    of Q f. So P_PEMA is the same, to rounding.

    Args:
        adapter: trained on Q f with W_hd Q^T.
        Q: (d, d) float64.
        description: that of the plain PLM.
    """
    plain = Adapter(replace(adapter.config, plm=description), adapter.tokens)
    with torch.no_grad():
        plain.A.copy_(adapter.A.double() @ Q)
        plain.B_pd.copy_(Q.T @ adapter.B_pd.double())
    if adapter.B_rct is not None:
        plain.B_rct = (Q.T @ adapter.B_rct.double()).to(adapter.B_rct.dtype)
    return plain.eval()


def compare(plm: LocalPLM, data: Data, preset: str, seed: int, *, masked: bool, work: Path) -> dict[str, Any]:
    """Train one adapter and score it.

    Returns:
        Cross-entropy in nats a token and perplexity of P_PEMA alone and of the mixture with the fitted schedule, on
        dev and test, and the metrics of the test texts.
    """
    mask = published_mask(seed)
    owner: PLM = MaskedPLM(plm, mask) if masked else plm
    folder = work / (f"masked{seed}" if masked else "plain")
    task, config = get_task(data.task), preset_of(preset, seed=seed)
    memory = build_memory(owner, list(data.train), task, folder / "memory")
    path = folder / f"{preset}-seed{seed}"
    adapter, trained = train(memory, config, path, resume=path.exists())
    schedule = adapter.config.choose_schedule("fitted")
    result = {"data": data.name, "head": "masked" if masked else "plain"} | {k: trained[k] for k in KEPT}
    for part in ("dev", "test"):
        view = build_memory(owner, examples(data, part), task, folder / part).view()
        result[f"{part}_perplexity_plm"] = perplexity(view, owner.head())
        result[f"{part}_perplexity_pema"] = perplexity(view, owner.head(), adapter)
        result[f"{part}_perplexity"] = perplexity(view, owner.head(), adapter, schedule)
    if masked:
        adapter = unmasked(adapter, mask.rotation(plm.head().d, plm.description.fingerprint), plm.description)
        view = build_memory(plm, examples(data, "test"), task, work / "plain" / "test").view()
        result["test_perplexity_unmasked"] = perplexity(view, plm.head(), adapter, schedule)
    hypotheses = generate(plm, adapter, [e.source for e in data.test], task, schedule)
    scores = evaluate(task, hypotheses, [e.target for e in data.test], annotated=data.annotated.get("test"))
    result |= {name: round(score.value, 4) for name, score in scores.items()}
    result["metrics"] = {name: score.signature for name, score in scores.items()}
    facts = {"preset": preset, "training": config.to_dict(), "plm": owner.description.to_dict()}
    facts |= {"data": data.name, "data_sha256": data.digest()}
    return result | {"signature": signature(facts, seed)}


def examples(data: Data, part: str) -> list[Example]:
    """Return the examples of dev or test."""
    return list(data.dev if part == "dev" else data.test)


def recovered(released: Tensor, table: Tensor) -> float:
    """Return the share of released rows whose nearest row of the true table, by cosine, is their own.

    Args:
        released: (V, d).
        table: (V, d), row i being the true one of released row i.
    """
    released, table = normalize(released, dim=1), normalize(table, dim=1)
    nearest = [(piece @ table.T).argmax(1) for piece in torch.split(released, 1024)]
    return float((torch.cat(nearest) == torch.arange(len(table))).float().mean())


def solved(masked: Tensor, plain: Tensor) -> Tensor:
    """Return the orthogonal matrix that best maps released to known rows (Procrustes): (n, d), (n, d) -> (d, d)."""
    U, _, V = torch.linalg.svd(plain.T.double() @ masked.double())
    Q: Tensor = U @ V
    return Q.float()


def disclosure(plm: LocalPLM, seed: int = 0) -> dict[str, Any]:
    """Measure what the released head reveals about the embedding table, and its loss of precision."""
    table = plm.model.get_input_embeddings().weight.detach()
    masked = MaskedPLM(plm, published_mask(seed))
    plain_W, masked_W = plm.head().weight, masked.head().weight
    sources = [[*plm.tokenizer(e.source)["input_ids"]] for e in support_data().test]
    plain = {a.index: a.representations for a in plm.represent(sources, [1] * len(sources))}
    both = [(plain[a.index], a.representations) for a in masked.represent(sources, [1] * len(sources))]
    logits = plm.head()(torch.cat([f for f, _ in both]))
    change = (masked.head()(torch.cat([Qf for _, Qf in both])) - logits).abs().max()
    random = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    known = []
    for count in KNOWN:
        rows, others = random[:count], random[count:]
        guess = rotate(masked_W, solved(masked_W[rows], plain_W[rows]))
        known.append({"rows": count, "recovered": recovered(guess[others], table[others])})
    return {
        "tied": bool(torch.equal(plain_W, table)),
        "rows": len(table),
        "width": table.shape[1],
        "recovered_plain": recovered(plain_W, table),
        "recovered_masked": recovered(masked_W, table),
        "chance": 1 / len(table),
        "known": known,
        "inner_products_change": float((masked_W[:1024] @ masked_W.T - plain_W[:1024] @ plain_W.T).abs().max()),
        "largest_inner_product": float((plain_W[:1024] @ plain_W.T).abs().max()),
        "contexts": len(logits),
        "logits_change": float(change),
        "largest_logit": float(logits.abs().max()),
        "signature": signature({"plm": plm.description.to_dict()}, seed),
    }


def main() -> None:
    """Run the missing experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/masked_head"), help="memories and adapters")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plm = LocalPLM.load("embedded", dtype="float32")
    if "disclosure" not in read_runs(RESULTS):
        put_run(RESULTS, "disclosure", disclosure(plm))
    data = cocoa(args.data) if args.data else support_data()
    for seed, preset, masked in product(range(args.seeds), ("residual", "paper"), (False, True)):
        name = f"{data.name}/{preset}-seed{seed}-{'masked' if masked else 'plain'}"
        if name not in read_runs(RESULTS):
            result = compare(plm, data, preset, seed, masked=masked, work=args.output / data.name)
            put_run(RESULTS, name, result)
            print(name, {k: v for k, v in result.items() if isinstance(v, float)}, flush=True)


if __name__ == "__main__":
    main()
