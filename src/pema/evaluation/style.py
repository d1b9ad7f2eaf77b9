"""Style by a classifier: how formal the hypotheses are, as a transformers text-classification model sees them.

A metric is named `MEASURE:MODEL` or `MEASURE:MODEL#LABEL`, where MODEL is a hub name or a local folder and LABEL the
model's name of the wanted style (`formal` where none is given), for example
`style_accuracy:s-nlp/roberta-base-formality-ranker`. The measures, with p = softmax(logits) at LABEL:

- `style_probability`: the mean of p, 0 to 1.
- `style_accuracy`: the share of hypotheses whose most probable label is LABEL, 0 to 1.
- `style_improvement`: the mean of p(hypothesis) - p(source), -1 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from pema.console import note
from pema.errors import ConfigError
from pema.evaluation.score import Array, require_aligned
from pema.owner.loading import NO_LIMIT, load_as, max_length, name_of, resolve
from pema.owner.weights import fingerprint

PROBABILITY, ACCURACY, IMPROVEMENT = MEASURES = ("style_probability", "style_accuracy", "style_improvement")
FORMAL = "formal"
TOKENS = 8192
"""Padded tokens of a batch, at most: a batch of long texts holds fewer of them."""


class StyleClassifier:
    """P(label | text), (n, labels), of a text-classification model; every text is classified once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a classifier.

        Raises:
            ConfigError: the model is not one of several labels that exclude each other, or its tokenizer cannot pad.
        """
        self.name = name_of(model)
        labels = model.config.id2label
        if len(labels) < 2 or model.config.problem_type == "multi_label_classification":
            raise ConfigError(
                f"{self.name} is not a classifier into labels that exclude each other (it has {len(labels)}, "
                f"problem_type={model.config.problem_type!r}): give one with a label for each style."
            )
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"the tokenizer of {self.name} has no padding token (pad_token): set one.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.labels = [labels[i] for i in range(len(labels))]
        self.window = _window(model, tokenizer)
        self.fingerprint = fingerprint(model)
        self._known: dict[str, Array] = {}

    def label_index(self, label: str) -> int:
        """Where `label` stands among the model's labels, whatever its case unless that tells two of them apart.

        Raises:
            ConfigError: the model has no such label, or several; the message lists those that it has.
        """
        if label in self.labels:
            return self.labels.index(label)
        found = [i for i, each in enumerate(self.labels) if each.casefold() == label.casefold()]
        if len(found) != 1:
            raise ConfigError(
                f"{self.name} has no label {label!r}; it has {', '.join(self.labels)}. Name the wanted style behind "
                f"the model, e.g. {ACCURACY}:{self.name}#{self.labels[-1]}."
            )
        return found[0]

    def probabilities(self, texts: Sequence[str]) -> Array:
        """P(label | text): (n, labels). What lies beyond the model's window is cut off, with a note."""
        new = sorted({text for text in texts if text not in self._known})
        if new:
            self._classify(new)
        return np.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _classify(self, texts: list[str]) -> None:
        # The characters of a special token in a text are characters.
        text_alone: dict[str, Any] = {"split_special_tokens": True, "verbose": False}
        whole = [len(ids) for ids in self.tokenizer(texts, **text_alone)["input_ids"]]
        longer = sum(length > self.window for length in whole)
        if longer:
            note(f"{longer} of {len(texts)} texts are cut to the {self.window} tokens that {self.name} reads.")
        # Texts of like length share a batch; the shortest come first.
        order = sorted(range(len(texts)), key=whole.__getitem__)
        while order:
            size = 1
            while size < len(order) and (size + 1) * min(whole[order[size]], self.window) <= TOKENS:
                size += 1
            batch, order = [texts[i] for i in order[:size]], order[size:]
            inputs = self.tokenizer(
                batch, padding=True, truncation=True, max_length=self.window, return_tensors="pt", **text_alone
            ).to(self.model.device)
            found = self.model(**inputs).logits.float().softmax(-1).cpu().numpy().astype(np.float64)
            self._known.update(zip(batch, found, strict=True))


class Style:
    """One measure of a classifier, on the contract of a metric; the references are not read."""

    def __init__(
        self, measure: str, classifier: StyleClassifier, label: str = FORMAL, sources: Sequence[str] | None = None
    ) -> None:
        """Take a measure, a label and, for `style_improvement`, the sources.

        Raises:
            ConfigError: the classifier has no such label, or `style_improvement` comes without sources.
        """
        if measure == IMPROVEMENT and sources is None:
            raise ConfigError(f"{IMPROVEMENT} compares the hypotheses with their sources: give the sources.")
        self.measure, self.classifier, self.sources = measure, classifier, sources
        self.index = classifier.label_index(label)

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """The measure of each segment and 1, which counts it: (n, 2)."""
        found = self.classifier.probabilities(hypotheses)
        values = found[:, self.index]
        if self.measure == ACCURACY:
            values = (found.argmax(1) == self.index).astype(np.float64)
        elif self.measure == IMPROVEMENT and self.sources is not None:
            require_aligned(hypotheses=hypotheses, sources=self.sources)
            values = values - self.classifier.probabilities(self.sources)[:, self.index]
        return np.stack([values, np.ones(len(values))], 1)

    def value(self, totals: Array) -> float:
        """The mean over the segments."""
        return float(totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """The measure, the classifier with the first 12 digits of its weights' SHA-256, the label, the window."""
        c = self.classifier
        label = c.labels[self.index]
        model = f"model:{c.name}@{c.fingerprint[:12]}"
        return f"{self.measure}|{model}|label:{label}|window:{c.window}|n:{int(totals[1])}"


def is_style(name: str) -> bool:
    """Whether a metric's name is one of this module's."""
    return name.partition(":")[0] in MEASURES


def style(name: str, sources: Sequence[str] | None = None) -> Style:
    """The metric called `MEASURE:MODEL` or `MEASURE:MODEL#LABEL`.

    Raises:
        ConfigError: no model is named, it has no such label, or `style_improvement` comes without sources.
        OwnerError: the model cannot be loaded.
    """
    measure, _, rest = name.partition(":")
    model, _, label = rest.partition("#")
    if not model:
        raise ConfigError(
            f"{name!r} names no classifier: write {measure}:MODEL, with a transformers text-classification model."
        )
    return Style(measure, load_classifier(model), label or FORMAL, sources)


@lru_cache(maxsize=2)
def load_classifier(name: str) -> StyleClassifier:
    """Load a text-classification model, on an accelerator where there is one.

    Raises:
        OwnerError: it cannot be loaded, or the checkpoint lacks the classifier's weights.
    """
    place, called = resolve(name)
    kind = AutoModelForSequenceClassification
    model, tokenizer = load_as(kind, "a text classifier", place, called, dtype=torch.float32)
    return StyleClassifier(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


def _window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the classifier reads: what both tokenizer and positions allow."""
    positions = max_length(model, tokenizer)
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from behind the padding's.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions -= padding + 1
    return min(positions, int(getattr(tokenizer, "model_max_length", NO_LIMIT)), NO_LIMIT)
