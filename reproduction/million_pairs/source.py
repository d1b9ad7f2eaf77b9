"""The PLM with random weights, and texts whose next word depends linearly on the representation of their last one.

The texts are a bigram language: the class of a word is the largest of `CLASSES` random linear functions of its
embedding, all of rank `RANK`, and each class has a distribution of the next word: Zipf's, turned by a product of random
vectors of the same rank. So the lowest possible loss is known (`Language.entropy`), that of the frequencies alone too,
and what lies between is what an adapter can learn from f.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from pema.devices import has_bfloat16
from pema.files import read_json
from pema.tasks.registry import Task
from pema.tasks.template import Template
from reproduction.lines import write_lines
from reproduction.million_pairs.options import Setting

PLM, TEXTS, FACTS = "plm", "texts.jsonl", "facts.json"
TASK = Task("continuation", Template("text {source} end", chat=False), (), "")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
FIXED = (*SPECIAL, "Ġtext", "Ġend")
CLASSES, RANK, STRENGTH = 256, 16, 1.0
LETTERS = 4


def words(count: int) -> list[str]:
    """Return `count` different words of four letters, none of them in `FIXED`."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        number += 1
        word, rest = "", number
        for _ in range(LETTERS):
            rest, letter = divmod(rest, 26)
            word += string.ascii_lowercase[letter]
        if f"Ġ{word}" not in FIXED:
            found.append(word)
    return found


def tokenizer(V: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of V tokens, each of which is a word with the space in front of it."""
    names = [*FIXED, *(f"Ġ{word}" for word in words(V - len(FIXED)))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def language_model(setting: Setting) -> OPTForCausalLM:
    """Build OPT with one layer and random weights.

    The layer adds a tenth of what it would, so that f is mostly the embedding of the last token; W_hd is not tied to
    the embeddings, because the PLM would then mostly repeat that token.
    """
    config = OPTConfig(
        vocab_size=setting.V,
        hidden_size=setting.d,
        word_embed_proj_dim=setting.d,
        ffn_dim=setting.ffn,
        num_hidden_layers=1,
        num_attention_heads=setting.heads,
        max_position_embeddings=2 * (setting.words + setting.length),
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(setting.seed)
    dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
    model: OPTForCausalLM = OPTForCausalLM._from_config(config, dtype=dtype)
    decoder = model.model.decoder
    with torch.no_grad():
        for part in (decoder.layers[0].self_attn.out_proj, decoder.layers[0].fc2):
            part.weight *= 0.1 * config.init_std
        decoder.embed_positions.weight *= 0.1
        model.lm_head.weight.normal_(std=setting.d**-0.5)
    return model.eval()


@dataclass(frozen=True)
class Language:
    """The bigram language.

    Attributes:
        classes: (V,) the class of each token.
        tokens: (seen,) token ids of the words, the most frequent first.
        p: (CLASSES, seen) the distribution of the next word.
    """

    classes: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]
    p: np.ndarray[Any, Any]

    @classmethod
    def of(cls, embeddings: torch.Tensor, setting: Setting) -> Language:
        """Make the language of a PLM's token embeddings, (V, d)."""
        draw = torch.Generator().manual_seed(setting.seed)
        common = torch.randn(setting.d, RANK, generator=draw)
        values = embeddings.float() @ common @ torch.randn(RANK, CLASSES, generator=draw)
        tokens = len(FIXED) + torch.randperm(setting.V - len(FIXED), generator=draw)[: setting.seen]
        zipf = -torch.log(torch.arange(1, setting.seen + 1).float())
        turned = torch.randn(CLASSES, RANK, generator=draw) @ torch.randn(RANK, setting.seen, generator=draw)
        p = torch.softmax(zipf + STRENGTH * turned * RANK**-0.5 * 2, -1)
        return cls(values.argmax(1).numpy(), tokens.numpy(), p.double().numpy())

    def texts(self, setting: Setting) -> tuple[np.ndarray[Any, Any], float, float]:
        """Draw sources and targets.

        Returns:
            (examples, words + length - 1) token ids, and two losses of the targets in nats per token: of the language
            itself, and of the frequencies of the words.
        """
        random = np.random.default_rng(setting.seed)
        cumulated = self.p.cumsum(1)
        cumulated /= cumulated[:, -1:]
        drawn = np.empty((setting.examples, setting.words + setting.length - 1), np.int64)
        # Words of a source are drawn evenly, so that few targets occur in their prompts.
        drawn[:, : setting.words] = random.integers(0, setting.seen, (setting.examples, setting.words))
        loss = 0.0
        for t in range(setting.words, drawn.shape[1]):
            # The word before the first of the target is the template's.
            before = FIXED.index("Ġend") if t == setting.words else self.tokens[drawn[:, t - 1]]
            of = np.broadcast_to(self.classes[before], setting.examples)
            for number in np.unique(of):
                rows = np.flatnonzero(of == number)
                drawn[rows, t] = np.searchsorted(cumulated[number], random.random(len(rows)))
                loss -= float(np.log(self.p[number, drawn[rows, t]]).sum())
        targets = drawn[:, setting.words :]
        counts = np.bincount(targets.ravel(), minlength=setting.seen)
        share = counts[counts > 0] / targets.size
        return self.tokens[drawn], loss / targets.size, float(-(share * np.log(share)).sum())


def prepare(setting: Setting, folder: Path) -> dict[str, Any]:
    """Write the PLM and its texts, and return what is known of them."""
    if (folder / FACTS).exists():
        return read_json(folder / FACTS)
    model, tokens = language_model(setting), tokenizer(setting.V)
    model.save_pretrained(folder / PLM)
    tokens.save_pretrained(folder / PLM)
    ids, lowest, frequencies = Language.of(model.model.decoder.embed_tokens.weight.detach(), setting).texts(setting)
    names = np.array([name.removeprefix("Ġ") for name in tokens.convert_ids_to_tokens(list(range(setting.V)))])
    texts = (names[row].tolist() for row in ids)
    pairs = ({"source": " ".join(text[: setting.words]), "target": " ".join(text[setting.words :])} for text in texts)
    write_lines(folder / TEXTS, pairs)
    facts = {"loss_of_the_language": lowest, "loss_of_the_frequencies": frequencies}
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return facts
