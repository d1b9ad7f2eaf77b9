import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pema.errors import ConfigError, DataError
from pema.tasks.encoding import Encoding
from pema.tasks.example import Example
from pema.tasks.template import Template

CORPUS = [
    "Translate this from English to German: \nThe house is small.\nGerman: Das Haus ist klein.",
    "the cat sat on the mat: die Katze sitzt auf der Matte; user says hi, assistant says <tool> im start end s / |",
] * 3
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[SEP]"]
CHAT = "<|im_start|>user\nTo German: {source}<|im_end|>\n<|im_start|>assistant\n"


def finish(backend, *, bos=True, **options):
    """A fast tokenizer with special tokens, one that eats the spaces before it, and two that are not special."""
    backend.add_tokens(
        [AddedToken("<tool_call>", special=False, normalized=False), AddedToken("<think>", special=False)]
    )
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


def byte_level(*, bos=True):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return finish(backend, bos=bos)


def sentencepiece_bpe():
    """As Llama 2: the spaces are characters, bytes fall back, and the special tokens lie in the vocabulary."""
    specials = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("a", -1.0)]
    pieces = [*specials, *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    (found,) = Template("{source}\n").encode_prompts(tokenizer, ["a</s>"])
    assert tokenizer.eos_token_id not in found.prompt
    with pytest.raises(DataError, match="source 1, source: '<0x0A>' is a control token"):
        Template("{source}\n").encode_prompts(tokenizer, ["a<0x0A>"])


def test_a_tokenizer_with_a_part_in_python_refuses_what_it_cannot_write():
    class Same:
        def pre_tokenize(self, text):
            pass

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Same())
    with pytest.raises(DataError, match=r"'</s>' is a control token of the PLM, and its tokenizer \(\w+\) cannot"):
        Template("{source} =").encode_prompts(tokenizer, ["a</s>"])


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused():
    class Odd:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [1, 9, 2, 3][: 4 if add_special_tokens else 2][:: 1 if add_special_tokens else -1]}

    with pytest.raises(ConfigError, match="Odd changes a text's tokens when it adds special tokens"):
        Template("{source} =").encode_prompts(Odd(), ["a"])
