"""SmolLM2 through llama.cpp: adapted to descriptions of restaurants, scored beside transformers; minutes long."""

import pytest

from pema.owner.opening import open_plm
from restaurants import PLM, adapt_and_score, require_packaged

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow


def test_it_is_adapted_as_with_transformers(tmp_path):
    require_packaged()
    results = {
        name: adapt_and_score(open_plm(name), tmp_path / name.replace(":", "-"), 200, 20, 30)
        for name in (f"llamacpp:{PLM}", PLM)
    }
    for alone, pema_scores, perplexity in results.values():
        assert pema_scores["bleu"] > alone["bleu"] + 15
        assert pema_scores["slot_errors"] < alone["slot_errors"]
        assert perplexity < 6
    (_, ours, perplexity), (_, theirs, expected) = results.values()
    assert perplexity == pytest.approx(expected, rel=0.03)
    assert ours["bleu"] == pytest.approx(theirs["bleu"], abs=6)
