from pema.tasks.spelling import NONE, Speller, Spelling, speller_of
from tiny import build_tokenizer


class Vocabulary:
    def __init__(self, names, special=()):
        self.names, self.all_special_ids = names, special

    def get_vocab(self):
        return {name: i for i, name in enumerate(self.names)}


NAMES = ["<s>", "[", "F", "itz", "bill", "ies", "]", "ĠFitz", "Ġitz", "Ġin", "Man", "ĠMan", "ĠF", "7", "Ġ7"]
GREEK = ["<s>", "▁α", "α", "β", "▁αβ", "Ġαβ"]


def spell(names, tokens, special=(0,)):
    return [tuple(spelling) for spelling in Speller(Vocabulary(names, special))(tokens)]


def test_the_longest_token_that_writes_a_word_after_a_space():
    # "[Fitzbillies]" after a space: " Fitz" for two tokens. Inside a word nothing has a spelling, though " itz" exists.
    assert spell(NAMES, [1, 2, 3, 4, 5, 6]) == [(NONE, 0), (7, 2), (NONE, 0), (NONE, 0), (NONE, 0), (NONE, 0)]
    assert spell(NAMES, [10, 9, 10]) == [(11, 1), (NONE, 0), (NONE, 0)]
    assert spell(NAMES, [13]) == [(14, 1)]
    assert spell(NAMES, []) == []


def test_a_control_token_ends_a_word():
    assert spell(NAMES, [2, 0, 3]) == [(12, 1), (NONE, 0), (8, 1)]
    assert spell(NAMES, [2, 3]) == [(7, 2), (NONE, 0)]


def test_both_marks_of_a_space():
    assert spell(GREEK, [2, 3]) == [(4, 2), (NONE, 0)]


def test_a_vocabulary_without_spaces_has_no_spellings():
    assert spell(["a", "b", "ab"], [0, 1], ()) == [(NONE, 0), (NONE, 0)]


def test_the_spelling_writes_the_same_text_with_a_real_tokenizer():
    tokenizer = build_tokenizer()
    speller = speller_of(tokenizer)
    assert speller is speller_of(tokenizer)
    tokens = tokenizer("the old man, (the) sea", add_special_tokens=False)["input_ids"]
    found = 0
    for i, spelling in enumerate(speller(tokens)):
        if spelling != Spelling(NONE, 0):
            found += 1
            assert tokenizer.decode([spelling.token]) == " " + tokenizer.decode(tokens[i : i + spelling.span])
    assert found
