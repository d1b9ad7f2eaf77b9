import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pema.tasks.retrieval import K1, B, Index


def bm25(texts, query, n):
    """The definition, one n-gram and one text at a time."""

    def grams(text):
        folded = f" {' '.join(text.lower().split())} "
        return [folded[i : i + n] for i in range(max(1, len(folded) - n + 1))]

    documents = [Counter(grams(text)) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for gram in set(grams(query)):
            holding = sum(gram in other for other in documents)
            tf = document[gram]
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += idf * tf * (K1 + 1) / (tf + K1 * (1 - B + B * document.total() / mean))
        scores.append(score)
    return scores


some_text = st.text("ab c", max_size=12)


@given(st.lists(some_text, min_size=1, max_size=6), some_text)
def test_scores_are_bm25(texts, query):
    np.testing.assert_allclose(Index(texts).scores(query), bm25(texts, query, 4), atol=1e-12)


def test_scripts_without_spaces_have_shorter_grams():
    texts = ["今天天气很好", "他昨天买了书", "我们去公园"]
    np.testing.assert_allclose(Index(texts).scores("昨天天气"), bm25(texts, "昨天天气", 2), atol=1e-12)


def test_the_most_similar_come_first_and_ties_in_order():
    index = Index(["the red house", "a blue car", "the blue house", "a blue car"])
    assert index.nearest("a blue car", 2) == [1, 3]
    assert index.nearest("THE BLUE HOUSES", 1) == [2]
    assert index.nearest("?", 9) == [0, 1, 2, 3]
