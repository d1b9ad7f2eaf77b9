"""A PLM behind the owner's contract whose representations are a hash of the context: quick, and easy to recompute."""

import time
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pema.memory.build import build_memory
from pema.owner.bundle import NormSettings
from pema.owner.contract import ContextRepresentations, PLMDescription
from pema.owner.head import Head, Norm
from pema.tasks.example import Example
from pema.tasks.template import EncodedExample

V, D, EOS = 101, 8, 2


def f(context, d=D):
    """The representation of a context (a sequence of token ids)."""
    seed = zlib.crc32(np.array(context, np.int32).tobytes())
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(d).astype(np.float32))


def g(context):
    """What the PLM generates after a context."""
    token = zlib.crc32(b"next" + np.array(context, np.int32).tobytes()) % 12
    return EOS if token == 0 else 20 + token


class FakeTemplate:
    text, chat, system = "Say {source}:", False, None

    def settled(self, tokenizer):
        return self

    def chat_template(self, tokenizer):
        return None

    def encode(self, tokenizer, examples, *, apart=False):
        return [
            EncodedExample(
                (1, *self.ids(example.source), 3),
                (*self.ids(example.target), EOS) if example.target else (),
                max(1, len(example.source)),
            )
            for example in examples
        ]

    @staticmethod
    def ids(text):
        return tuple(20 + byte % 64 for byte in text.encode())


@dataclass(frozen=True)
class FakeTask:
    name: str = "echo"
    template: FakeTemplate = field(default_factory=FakeTemplate)


class FakeTokenizer:
    """Names the tokens of texts, some of them after a space as well: token 84 + k writes token 20 + 3 k after one."""

    all_special_ids = (0, 1, EOS)

    def get_vocab(self):
        names = {20 + k: f"{'abcdefghijklmnopqrstuvwxyz'[k % 26]}{k}" for k in range(64)} | {3: ":"}
        return {name: i for i, name in names.items()} | {f"Ġ{names[20 + 3 * k]}": 84 + k for k in range(16)}


class FakePLM:
    """Answers in a shuffled order, as length-bucketed batches do."""

    def __init__(self, *, d=D, tap="head_input", name="fake", seconds=0.0, change=lambda answer, sequence: answer):
        self.seconds, self.change, self.calls, self.skipped = seconds, change, [], []
        self.tokenizer = FakeTokenizer()
        generator = torch.Generator().manual_seed(1)
        norm = (
            Norm(NormSettings("rms", 1e-6), torch.rand(d, generator=generator), None) if tap == "norm_input" else None
        )

        self._head = Head(torch.randn(V, d, generator=generator), norm=norm)
        self.description = PLMDescription(
            name=name,
            architecture="FakeLM",
            fingerprint=name * 8,
            tokenizer_fingerprint="t" * 64,
            head_fingerprint=self._head.fingerprint,
            d=d,
            d_tap=d,
            vocabulary_size=V,
            tap=tap,
            max_length=64,
            eos_token_ids=(EOS,),
            parameters=V * d,
        )

    def head(self):
        return self._head

    def _answers(self, answers):
        order = np.random.default_rng(len(answers)).permutation(len(answers))
        for i in order:
            time.sleep(self.seconds)
            sequence, answer = answers[i]
            changed = self.change(answer, sequence)
            if changed is not None:
                yield changed

    def represent(self, sequences, starts, *, batch_tokens=8192, skip=frozenset()):
        self.calls.append(("represent", [tuple(s) for s in sequences], batch_tokens))
        self.skipped.append(set(skip))
        d = self.description.d_tap
        return self._answers(
            [
                (s, ContextRepresentations(i, torch.stack([f(s[:k], d) for k in range(start, len(s))])))
                for i, (s, start) in enumerate(zip(sequences, starts, strict=True))
                if i not in skip
            ]
        )

    def predict(self, prompts, steps, *, batch_tokens=8192, skip=frozenset()):
        self.calls.append(("predict", [tuple(p) for p in prompts], list(steps)))
        self.skipped.append(set(skip))
        answers = []
        for i, (prompt, most) in enumerate(zip(prompts, steps, strict=True)):
            if i in skip:
                continue
            assert 1 <= most <= self.description.max_length - len(prompt)
            rows, generated = [], []
            while len(rows) < most and (not generated or generated[-1] != EOS):
                context = [*prompt, *generated]
                rows.append(f(context, self.description.d_tap))
                generated.append(g(context))
            answers.append((prompt, ContextRepresentations(i, torch.stack(rows), torch.tensor(generated))))
        return self._answers(answers)


def some_examples(count, seed=0):
    """Pairs of random words; where = "data.tsv:line"."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh"))

    def word(longest):
        return "".join(rng.choice(letters, rng.integers(1, longest)))

    return [Example(word(9), word(14), f"data.tsv:{k + 1}") for k in range(count)]


def build(output, examples=40, *, plm=None, **settings):
    """A memory of `examples` (a number, or a list) in shards of 8 examples."""
    chosen = some_examples(examples) if isinstance(examples, int) else examples
    settings = {"examples_per_shard": 8} | settings
    return build_memory(plm or FakePLM(), chosen, FakeTask(), output, **settings)


def files(folder):
    """Every file of a folder by its relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(folder, **changes):
    """Change the manifest of a memory, with a digest that matches."""
    from pema.memory.manifest import Manifest

    replace(Manifest.read(folder), **changes).write(folder)
