"""Style metrics by a classifier: formality of the hypotheses according to a transformers text-classification model.

A metric is named `MEASURE:MODEL` or `MEASURE:MODEL#LABEL`, where MODEL is a hub name or a local folder and LABEL is the
model's name for the desired style (default `formal`), for example `style_accuracy:s-nlp/roberta-base-formality-ranker`.
The measures, with p = softmax(logits) at LABEL:

- `style_probability`: the mean of p, 0 to 1.
- `style_accuracy`: the fraction of hypotheses whose most probable label is LABEL, 0 to 1.
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
from pema.evaluation.classifier_name import CLASSIFIER, ClassifierName
from pema.evaluation.notation import STYLE
from pema.evaluation.score import Array, Reference, require_aligned
from pema.owner.loading import NO_LIMIT, load_as, max_length, name_of
from pema.owner.sources.names import resolve
from pema.owner.weights import fingerprint

PROBABILITY, ACCURACY, IMPROVEMENT = STYLE
FORMAL = "formal"
TOKENS = 8192
"""Maximum number of padded tokens per batch: a batch of long texts holds fewer texts."""


class StyleClassifier:
    """Text-classification model that gives P(label | text), (n, labels); each text is classified once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a classifier.

        Raises:
            ConfigError: the model does not have several mutually exclusive labels, or its tokenizer cannot pad.
        """
        self.name = name_of(model)
        labels = model.config.id2label
        if len(labels) < 2 or model.config.problem_type == "multi_label_classification":
            raise ConfigError(
                f"{self.name} is not a classifier with several mutually exclusive labels (it has {len(labels)}, "
                f"problem_type={model.config.problem_type!r}): choose a classifier with one label per style."
            )
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"the tokenizer of {self.name} has no padding token (pad_token): set one.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.labels = [labels[i] for i in range(len(labels))]
        self.window = _window(model, tokenizer)
        self.fingerprint = fingerprint(model)
        self._known: dict[str, Array] = {}

    def label_index(self, label: str) -> int:
        """Return the index of `label` among the model's labels; case is ignored unless it distinguishes two labels.

        Raises:
            ConfigError: the model has no such label, or several; the message lists its labels.
        """
        if label in self.labels:
            return self.labels.index(label)
        indices = [i for i, each in enumerate(self.labels) if each.casefold() == label.casefold()]
        if len(indices) != 1:
            raise ConfigError(
                f"{self.name} has no label {label!r}; it has {', '.join(self.labels)}. Append the label of the desired "
                f"style to the model, e.g. {ACCURACY}:{self.name}#{self.labels[-1]}."
            )
        return indices[0]

    def probabilities(self, texts: Sequence[str]) -> Array:
        """Return P(label | text), (n, labels). Texts longer than the model's window are truncated, with a note."""
        new = sorted({text for text in texts if text not in self._known})
        if new:
            self._classify(new)
        return np.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _classify(self, texts: list[str]) -> None:
        # A special token that is spelled out in a text is ordinary text.
        text_alone: dict[str, Any] = {"split_special_tokens": True, "verbose": False}
        whole = [len(ids) for ids in self.tokenizer(texts, **text_alone)["input_ids"]]
        longer = sum(length > self.window for length in whole)
        if longer:
            note(f"{longer} of {len(texts)} texts are truncated to the {self.window} tokens that {self.name} reads.")
        # Texts of similar length share a batch; the shortest come first.
        order = sorted(range(len(texts)), key=whole.__getitem__)
        while order:
            size = 1
            while size < len(order) and (size + 1) * min(whole[order[size]], self.window) <= TOKENS:
                size += 1
            batch, order = [texts[i] for i in order[:size]], order[size:]
            inputs = self.tokenizer(
                batch, padding=True, truncation=True, max_length=self.window, return_tensors="pt", **text_alone
            ).to(self.model.device)
            p = self.model(**inputs).logits.float().softmax(-1).cpu().numpy().astype(np.float64)
            self._known.update(zip(batch, p, strict=True))


class Style:
    """Metric that is one measure of a classifier; the references are not read."""

    def __init__(
        self, measure: str, classifier: StyleClassifier, label: str = FORMAL, sources: Sequence[str] | None = None
    ) -> None:
        """Set the measure, the label and, for `style_improvement`, the sources.

        Raises:
            ConfigError: the classifier has no such label, or `style_improvement` is used without sources.
        """
        if measure == IMPROVEMENT and sources is None:
            raise ConfigError(f"{IMPROVEMENT} compares the hypotheses with their sources: give the sources.")
        self.measure, self.classifier, self.sources = measure, classifier, sources
        self.index = classifier.label_index(label)

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 2): the measure of each segment, and 1 as its count."""
        p = self.classifier.probabilities(hypotheses)
        values = p[:, self.index]
        if self.measure == ACCURACY:
            values = (p.argmax(1) == self.index).astype(np.float64)
        elif self.measure == IMPROVEMENT and self.sources is not None:
            require_aligned(hypotheses=hypotheses, sources=self.sources)
            values = values - self.classifier.probabilities(self.sources)[:, self.index]
        return np.stack([values, np.ones(len(values))], 1)

    def value(self, totals: Array) -> float:
        """Return the mean over the segments."""
        return float(totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """Return the measure, the classifier with 12 digits of its weights' SHA-256, the label and the window."""
        c = self.classifier
        label = c.labels[self.index]
        model = f"model:{c.name}@{c.fingerprint[:12]}"
        return f"{self.measure}|{model}|label:{label}|window:{c.window}|n:{int(totals[1])}"


def style(name: str, sources: Sequence[str] | None = None) -> Style:
    """Build the metric called `MEASURE:MODEL` or `MEASURE:MODEL#LABEL`.

    Raises:
        ConfigError: no model is named, it has no such label, or `style_improvement` is used without sources.
        OwnerError: the model cannot be loaded.
    """
    measure, model, label = ClassifierName.of(name)
    return Style(measure, load_classifier(model), label or FORMAL, sources)


@lru_cache(maxsize=2)
def load_classifier(name: str) -> StyleClassifier:
    """Load a text-classification model, onto a GPU if one is available.

    Raises:
        OwnerError: it cannot be loaded, or the checkpoint lacks the classifier's weights.
    """
    source = resolve(name)
    kind = AutoModelForSequenceClassification
    model, tokenizer = load_as(kind, CLASSIFIER, source.place, source.name, dtype=torch.float32)
    return StyleClassifier(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


def _window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that the classifier reads: the limit of both its tokenizer and its positions."""
    positions = max_length(model, tokenizer)
    for name, module in model.named_modules():
        # RoBERTa and similar models start their positions after the index of the padding.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions -= padding + 1
    return min(positions, int(getattr(tokenizer, "model_max_length", NO_LIMIT)), NO_LIMIT)
