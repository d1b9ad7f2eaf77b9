"""SmolLM2 of which llama.cpp's server gives log-probabilities only, scored beside transformers; minutes long."""

import pytest

from pema.owner.client.connection import KEY
from pema.owner.llamacpp.process import Settings, start
from pema.owner.logprobs.recover import recover_head
from pema.owner.opening import open_plm
from pema.owner.sources.names import gguf_file
from restaurants import PLM, adapt_and_score, require_packaged

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow

COUNTS = 40, 10, 10
"""Examples to learn from, to choose on and to generate for: each context of the first two is a request."""

SEEDS = 3
"""Trainings whose perplexity is averaged: after so few examples they differ by 10 %."""


def test_it_is_adapted_as_with_the_true_representations(tmp_path, monkeypatch):
    require_packaged()
    local = open_plm(PLM)
    about = local.description
    local.tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = gguf_file(PLM)
    server = start(Settings.of(file[1], about.max_length, about.vocabulary_size))
    try:
        monkeypatch.setenv(KEY, server.key)
        report = recover_head(server.url, tmp_path / "tokenizer", tmp_path / "head", queries=700)
        assert report.d == about.d
        assert report.gap > 1_000
        assert report.largest_error < 1e-3
        recovered = open_plm(f"logprobs+{server.url}#{tmp_path / 'head'}")
        alone, ours, perplexity = adapt_and_score(recovered, tmp_path / "recovered", *COUNTS, SEEDS)
    finally:
        server.stop()
    *_, expected = adapt_and_score(local, tmp_path / "local", *COUNTS, SEEDS)
    # 5.13 beside 5.33 was measured: it is trained along another path, because its numbers are uncorrelated. Texts of
    # adapters from so few examples differ more than those of the two ways, so they are compared with the PLM's only:
    # 30 and 9 BLEU.
    assert 0.88 * expected < perplexity < 1.05 * expected
    assert ours["bleu"] > alone["bleu"] + 10
