"""BLEU and chrF, with sacreBLEU's computation and signatures."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from pema.console import note
from pema.errors import ConfigError
from pema.evaluation.score import Array, Reference, all_valid
from pema.schema import among
from pema.tasks.characters import HAN, KANA, are_unspaced

BY_SPACES = ("13a", "intl", "none")
"""SacreBLEU's tokenizers that split words at spaces."""

DEFAULT, CHINESE, CHARACTERS = "13a", "zh", "char"


class Bleu:
    """BLEU, 0 to 100: mixed case, exponential smoothing.

    The tokenizer is one of sacreBLEU's, named in the signature. The default depends on the references: `zh` if most of
    their letters are Chinese, `char` if most belong to another script written without spaces (Japanese, Thai, Lao,
    Khmer, Burmese), and `13a` otherwise.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        """Set the tokenizer.

        Raises:
            ConfigError: sacreBLEU has no such tokenizer, or the tokenizer needs a package that is not installed.
        """
        self._given = tokenizer
        self._bleu = _sacrebleu(tokenizer or DEFAULT)

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 10): for each segment the matched and all n-grams, n = 1 to 4, and both lengths.

        An n-gram of several references matches as often as in the one that contains most of it, and the reference
        length is the one closest to the hypothesis (Papineni et al. 2002).
        """
        several = all_valid(references)
        texts = [text for each in several for text in each]
        _note_composition(hypotheses, texts)
        suited = suited_tokenizer(texts)
        if self._given is None:
            self._bleu = _sacrebleu(suited)
        elif self._given in BY_SPACES and suited != DEFAULT:
            note(
                f"bleu:{self._given} splits words at spaces, but most letters of the references belong to a script "
                f"without spaces: use bleu:{suited}."
            )
        scores = [
            self._bleu.corpus_score([text], [[each] for each in gold])
            for text, gold in zip(hypotheses, several, strict=True)
        ]
        self._bleu.num_refs = _count(several)
        return np.array([(*s.counts, *s.totals, s.sys_len, s.ref_len) for s in scores], np.float64)

    def value(self, totals: Array) -> float:
        """Return the corpus score of summed counts."""
        counts = [int(count) for count in totals]
        return float(BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score)

    def signature(self, totals: Array) -> str:
        """Return sacreBLEU's own signature."""
        return f"BLEU|{self._bleu.get_signature()}"


class Chrf:
    """ChrF2 (Popović 2015), 0 to 100: F-measure with beta = 2 of character n-grams, n = 1 to 6, without spaces.

    Precision and recall are averaged over the orders n that both sides have, as sacreBLEU does by default.
    """

    ORDER = CHRF.CHAR_ORDER
    BETA = CHRF.BETA

    def __init__(self) -> None:
        """Set the signature to one reference per segment."""
        self._chrf = _signed(CHRF())

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 18): for each order the n-grams of the hypothesis, of the reference and of both.

        Of several references, the one with the highest score for the segment counts, as in sacreBLEU.
        """
        several = all_valid(references)
        _note_composition(hypotheses, [text for each in several for text in each])
        self._chrf.num_refs = _count(several)
        return np.stack(
            [
                max((self._counts(text, each) for each in gold), key=None if len(gold) == 1 else self.value)
                for text, gold in zip(hypotheses, several, strict=True)
            ]
        )

    def _counts(self, text: str, gold: str) -> Array:
        orders = range(1, self.ORDER + 1)
        return np.array([count for n in orders for count in _shared(_unspaced(text), _unspaced(gold), n)], np.float64)

    def value(self, totals: Array) -> float:
        """Return the corpus score of summed counts."""
        counts = totals.reshape(self.ORDER, 3)
        counts = counts[(counts[:, :2] > 0).all(1)]
        if not counts[:, 2].any():
            return 0.0
        precision, recall = (counts[:, 2] / counts[:, i] for i in (0, 1))
        p, r = precision.mean(), recall.mean()
        return float(100 * ((1 + self.BETA**2) * p * r / (self.BETA**2 * p + r)))

    def signature(self, totals: Array) -> str:
        """Return sacreBLEU's own signature."""
        return f"chrF2|{self._chrf.get_signature()}"


def bleu(tokenizer: str | None = None) -> Bleu:
    """Build BLEU with one of sacreBLEU's tokenizers; see `Bleu`."""
    return Bleu(tokenizer)


def chrf() -> Chrf:
    """Build chrF2 with sacreBLEU's defaults."""
    return Chrf()


def suited_tokenizer(references: Sequence[str]) -> str:
    """Return the sacreBLEU tokenizer that suits the script of most letters of the references."""
    if not are_unspaced(references):
        return DEFAULT
    # Japanese is written in Chinese characters and kana; Chinese has kana in names only.
    text = "".join(references)
    chinese, kana = len(HAN.findall(text)), len(KANA.findall(text))
    return CHINESE if chinese > 4 * kana and chinese else CHARACTERS


def _note_composition(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Print a note if only one side has decomposed letters: sacreBLEU compares code points."""
    decomposed = [sum(not unicodedata.is_normalized("NFC", text) for text in side) for side in (hypotheses, references)]
    if any(decomposed) and not all(decomposed):
        side = "hypotheses" if decomposed[0] else "references"
        note(
            f"{sum(decomposed):,} {side} are not in composed letters (NFC), but the other side is: BLEU and chrF count "
            "the two forms as different. Normalise both to NFC first."
        )


def _sacrebleu(tokenizer: str) -> BLEU:
    among("sacreBLEU tokenizer", [tokenizer], BLEU.TOKENIZERS)
    try:
        return _signed(BLEU(tokenize=tokenizer, force=True))
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"sacreBLEU's tokenizer {tokenizer!r} cannot be used on this machine: {reason}") from error


def _signed(metric: BLEU | CHRF) -> BLEU | CHRF:
    """Set the number of references of a sacreBLEU metric to one, which its signature gives, and return the metric."""
    metric.corpus_score([""], [[""]])
    return metric


def _count(references: Sequence[Sequence[str]]) -> int:
    """Return the number of references of every segment as sacreBLEU's signature takes it: -1 if it varies."""
    counts = {len(each) for each in references}
    return counts.pop() if len(counts) == 1 else -1


def _unspaced(text: str) -> str:
    return "".join(text.split())


def _shared(hypothesis: str, reference: str, n: int) -> tuple[int, int, int]:
    """Count the n-grams of both and their matches; 0 for a hypothesis whose reference is shorter than n."""
    counts, gold = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (hypothesis, reference))
    return counts.total() if gold else 0, gold.total(), (counts & gold).total()
