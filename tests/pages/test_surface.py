"""How tokens look, for tokenizers that write spaces and bytes in different ways."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pema.pages.inspector.surface import Surface, surfaces


@pytest.fixture(scope="module")
def metaspace():
    """As in Llama: ▁ for a space, a token for every byte, and a first space that decoding strips."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁das", "▁Haus", "s", "\ufffd"]
    model = models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def ids(tokenizer, *names):
    return tokenizer.convert_tokens_to_ids(list(names))


def shown(tokenizer, tokens):
    """The surface of every token behind those before it."""
    return [surfaces(tokenizer, tokens[:n], [token])[0] for n, token in enumerate(tokens)]


def test_byte_level_tokens_show_spaces_and_whole_characters(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    text = "das Haus"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(surface.text for surface in shown(tokenizer, tokens)) == text
    assert not any(surface.is_name for surface in shown(tokenizer, tokens))


@pytest.mark.parametrize("character", ["ü", "€", "😀", "ب"])
def test_a_character_shows_at_the_byte_that_completes_it(tiny_tokenizer, character):
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("a" + character + "b", add_special_tokens=False)["input_ids"]
    found = shown(tokenizer, tokens)
    data = character.encode()
    names = [Surface(f"0x{byte:02X}", is_name=True) for byte in data[:-1]]
    assert found == [Surface("a"), *names, Surface(character), Surface("b")]


def test_what_may_follow_half_a_character(tiny_tokenizer):
    """The byte that completes it, one that does not, and a word that leaves it broken."""
    tokenizer = tiny_tokenizer()
    a, first, last = tokenizer("aü", add_special_tokens=False)["input_ids"]
    (b,) = tokenizer("b", add_special_tokens=False)["input_ids"]
    assert surfaces(tokenizer, [a, first], [last, first, b]) == [
        Surface("ü"),
        Surface("0xC3", is_name=True),
        Surface("b"),
    ]
    assert surfaces(tokenizer, [a], [last]) == [Surface("0xBC", is_name=True)]


def test_special_tokens_and_unknown_ones_have_names(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    assert surfaces(tokenizer, [], [2, 0]) == [Surface("</s>", is_name=True), Surface("<pad>", is_name=True)]
    assert surfaces(tokenizer, [5], [10**5]) == [Surface("token 100000", is_name=True)]
    assert Surface("</s>", is_name=True).to_json() == {"name": "</s>"}
    assert Surface(" a").to_json() == " a"


def test_spaces_of_metaspace_tokens_show_also_where_decoding_strips_them(metaspace):
    house, the, s = ids(metaspace, "▁Haus", "▁das", "s")
    assert shown(metaspace, [s, the, house, s])[1:] == [Surface(" das"), Surface(" Haus"), Surface("s")]


def test_bytes_of_metaspace_tokenizers(metaspace):
    s, first, last = ids(metaspace, "s", "<0xC3>", "<0xBC>")
    assert shown(metaspace, [s, first, last, s]) == [
        Surface("s"),
        Surface("<0xC3>", is_name=True),
        Surface("ü"),
        Surface("s"),
    ]


def test_a_few_tokens_before_are_as_good_as_all(tiny_tokenizer, monkeypatch):
    tokenizer = tiny_tokenizer()
    before = tokenizer("das Haus ist klein " * 3 + "€😀", add_special_tokens=False)["input_ids"]
    tokens = range(3, len(tokenizer))
    for cut in range(7):
        few = surfaces(tokenizer, before[: len(before) - cut], tokens)
        with monkeypatch.context() as patch:
            patch.setattr("pema.pages.inspector.surface.CONTEXT", 1000)
            assert surfaces(tokenizer, before[: len(before) - cut], tokens) == few
