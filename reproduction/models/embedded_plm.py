"""Training of the bundled PLM: a 9 M parameter Llama that translates English to German.

    python -m reproduction.models.embedded_plm pairs.tsv.gz -o tatoeba-en-de-9m

The corpus is a TSV of (English, German) pairs (Tatoeba through manythings.org, CC BY 2.0 FR). 2,000 English sentences
are held out with all their translations: 1,000 to choose settings, 1,000 as test. The instruction is the same in every
example, so a row of the batch contains it once, followed by as many examples as fit; the mask allows an example to see
the instruction and itself, and its positions start after the instruction, as if it were alone. The loss covers the
target tokens only. Everything is seeded: the same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

INSTRUCTION = "Translate this from English to German: \n"
PROMPT = INSTRUCTION + "{source}\nGerman:"
LONGEST = 96  # tokens of prompt and target together; the few longer pairs are left out


def split(pairs: list[tuple[str, str]], seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Split by English sentence, so that no source of dev or test occurs in train with any translation."""
    sources = sorted({source for source, _ in pairs})
    random.Random(seed).shuffle(sources)
    dev, test = set(sources[:1000]), set(sources[1000:2000])
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for source, target in pairs:
        parts["dev" if source in dev else "test" if source in test else "train"].append((source, target))
    return parts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; `</s>` begins and ends a sequence, and the tokenizer adds it at the beginning."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", bos_token="</s>")


def pack(examples: list[tuple[list[int], int]], prefix: list[int], length: int, order: list[int]) -> list[list[int]]:
    """Return rows of example indices that fit into `length` tokens after one instruction (next fit)."""
    rows: list[list[int]] = []
    row: list[int] = []
    free = length - len(prefix)
    for i in order:
        tokens = len(examples[i][0])
        if tokens > free:
            rows.append(row)
            row, free = [], length - len(prefix)
        row.append(i)
        free -= tokens
    return [*rows, row] if row else rows


def collate(
    rows: list[list[int]], examples: list[tuple[list[int], int]], prefix: list[int], length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, positions and labels, each (rows, length), and the additive mask (rows, 1, length, length)."""
    p = len(prefix)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)  # the label at a position is the token that follows it
    owner = torch.full_like(tokens, -1)  # example number within the row; 0 is the instruction
    tokens[:, :p] = torch.tensor(prefix)
    positions[:, :p] = torch.arange(p)
    owner[:, :p] = 0
    for r, row in enumerate(rows):
        at = p
        for number, i in enumerate(row, start=1):
            ids, prompt = examples[i]
            end = at + len(ids)
            tokens[r, at:end] = torch.tensor(ids)
            positions[r, at:end] = torch.arange(p, p + len(ids))
            owner[r, at:end] = number
            labels[r, at + prompt - 1 : end - 1] = tokens[r, at + prompt : end]
            at = end
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.where(same & causal, 0.0, torch.finfo(torch.float32).min)
    return tokens, positions, labels, mask[:, None]


def orthogonalise(m: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix (Newton-Schulz) in float32; bf16 (torch.optim.Muon) is slow on CPUs."""
    x: Tensor = m.mT if m.size(0) > m.size(1) else m
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if m.size(0) > m.size(1) else x


class Muon(torch.optim.Optimizer):
    """Optimizer with momentum orthogonalised per matrix, scaled to AdamW's step size (Jordan 2024; Liu et al. 2025)."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix."""
        for group in self.param_groups:
            for w in group["params"]:
                buffer = self.state[w].setdefault("momentum", torch.zeros_like(w))
                buffer.lerp_(w.grad, 1 - group["momentum"])
                update = orthogonalise(w.grad.lerp(buffer, group["momentum"]))
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(update, alpha=-group["lr"] * 0.2 * max(w.shape) ** 0.5)


@torch.no_grad()
def translate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sources: list[str]) -> list[str]:
    """Return greedy translations, in the order of the sources."""
    model.eval()
    tokenizer.padding_side = "left"
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    out = [""] * len(sources)
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        batch = tokenizer([PROMPT.format(source=sources[i]) for i in some], return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=64, do_sample=False
        )
        for i, row in zip(some, ids[:, batch["input_ids"].size(1) :], strict=True):
            out[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return out


def bleu(hypotheses: list[str], sources: list[str], pairs: list[tuple[str, str]]) -> dict[str, object]:
    """Return corpus BLEU against all references of each source in the corpus."""
    import sacrebleu

    references: dict[str, list[str]] = {}
    for source, target in pairs:
        references.setdefault(source, []).append(target)
    most = max(map(len, references.values()))
    streams = [[(references[s][k] if k < len(references[s]) else None) for s in sources] for k in range(most)]
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(hypotheses, streams)
    return {"bleu": round(score.score, 2), "signature": str(metric.get_signature())}


def card(result: dict[str, object]) -> str:
    """Return the model card, with the numbers of this run."""
    dev, test = result["dev"], result["test"]
    assert isinstance(dev, dict)
    assert isinstance(test, dict)
    return f"""---
language: [en, de]
license: cc-by-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [translation]
---

# tatoeba-en-de-9m

A small causal language model of Llama architecture ({result["parameters"]:,} parameters, V = 8,192, bf16) that
translates short everyday sentences from English to German. It is bundled with pema for tests and examples, which
run offline; it is no translator to rely on.

Prompt: `Translate this from English to German: \\n{{source}}\\nGerman:`; the answer starts with a space and ends with
`</s>`.

Trained from scratch by `reproduction/models/embedded_plm.py` on {result["examples"]:,} English-German sentence pairs
({result["epochs"]} epochs, {result["steps"]} steps, {result["train_seconds"]} seconds on two busy CPU cores).

| held-out English sentences | BLEU (greedy, all references) |
|---|---|
| dev (1,000) | {dev["bleu"]} |
| test (1,000) | {test["bleu"]} |

Signature: `{test["signature"]}`. `training.json` holds the run's settings.

## Attribution

The training sentences are from Tatoeba (https://tatoeba.org), by its contributors, through manythings.org/anki
(2018-05-13), licensed CC BY 2.0 FR. The weights are released under the same licence.
"""


def main() -> None:
    """Train, score and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=32, help="rows of packed examples per batch")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--hidden-size", type=int, default=320)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=None, help="stop early (to measure speed)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    order_of = random.Random(args.seed)

    with gzip.open(args.corpus, "rt", encoding="utf-8") as lines:
        pairs = [(f[0], f[1]) for f in (line.rstrip("\n").split("\t") for line in lines)]
    parts = split(pairs)
    tokenizer = train_tokenizer([PROMPT.format(source=s) + " " + t + "\n" for s, t in parts["train"]], 8192)
    prefix = tokenizer(INSTRUCTION)["input_ids"]
    examples = []
    prompts = tokenizer([PROMPT.format(source=s) for s, _ in parts["train"]])["input_ids"]
    wholes = tokenizer([PROMPT.format(source=s) + " " + t + "</s>" for s, t in parts["train"]])["input_ids"]
    for prompt, whole in zip(prompts, wholes, strict=True):
        if whole[: len(prefix)] == prefix and whole[: len(prompt)] == prompt and len(whole) <= LONGEST:
            examples.append((whole[len(prefix) :], len(prompt) - len(prefix)))
    tokens = sum(len(ids) for ids, _ in examples)

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 14 // 5,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(w.numel() for w in model.parameters())
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and "embed" not in n]
    others = [w for n, w in model.named_parameters() if not (w.ndim == 2 and "embed" not in n)]
    optimizers = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    steps_per_epoch = tokens // (args.rows * (args.length - len(prefix))) + 1
    total = args.max_steps or int(args.epochs * steps_per_epoch)
    print(f"{len(examples)} examples, {tokens} tokens, {parameters / 1e6:.2f} M parameters, {total} steps", flush=True)

    step, seen, running, started = 0, 0, 0.0, time.perf_counter()
    model.train()
    while step < total:
        order = list(range(len(examples)))
        order_of.shuffle(order)
        rows = pack(examples, prefix, args.length, order)
        for at in range(0, len(rows), args.rows):
            if step >= total:
                break
            x, positions, labels, mask = collate(rows[at : at + args.rows], examples, prefix, args.length)
            hidden = model.model(input_ids=x, position_ids=positions, attention_mask=mask).last_hidden_state
            wanted = labels != -100
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])
            rate = args.lr * min(1.0, (step + 1) / 100) * (1 - max(0.0, step - 0.1 * total) / (0.9 * total))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step, seen = step + 1, seen + int((x != 0).sum())
            running = loss.item() if step == 1 else 0.97 * running + 0.03 * loss.item()
            if step % 20 == 0:
                elapsed = time.perf_counter() - started
                left = elapsed / step * (total - step) / 60
                print(f"{step}/{total} loss {running:.3f} {seen / elapsed:.0f} tok/s {left:.0f} min left", flush=True)
            if not math.isfinite(running):
                raise SystemExit(f"the loss is {running} at step {step}: lower --lr")

    model = model.to(torch.bfloat16)
    result: dict[str, object] = {
        "parameters": parameters,
        "examples": len(examples),
        "steps": total,
        "epochs": round(total / steps_per_epoch, 2),
        "train_seconds": round(time.perf_counter() - started),
        "loss": round(running, 4),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("corpus", "output")},
        "torch": torch.__version__,
    }
    scored = model.float()  # the rounded weights, computed in float32
    for part in ("dev", "test"):
        sources = sorted({source for source, _ in parts[part]})
        result[part] = bleu(translate(scored, tokenizer, sources), sources, parts[part])
    temporary = args.output.with_name(args.output.name + ".tmp")
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(card(result), encoding="utf-8")
    temporary.replace(args.output)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
