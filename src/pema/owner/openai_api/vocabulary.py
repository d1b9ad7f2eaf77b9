"""The tokenizer of an API's model: tokens as bytes, prompts as texts or turns, both read back from token ids."""

from __future__ import annotations

import codecs
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pema.errors import DataError, OwnerError
from pema.extras import require_library
from pema.owner.openai_api.answers import Named
from pema.owner.openai_api.config import Endpoint
from pema.owner.sources.gguf import converted
from pema.owner.sources.names import gguf_file
from pema.owner.sources.packaged import PACKAGED
from pema.schema import short
from pema.tasks.chat import end_of_turn
from pema.tasks.example import Turn

if TYPE_CHECKING:
    from pema.tasks.example import Role

TIKTOKEN = "tiktoken:"
"""Beginning of the name of a tokenizer of the tiktoken library."""

ROLES: dict[Role, str] = {role: f"<|pema_{role}|>" for role in ("system", "user", "assistant")}
"""Control tokens in front of the turns of a chat: they stand for what the API writes there itself."""

SPACE = "▁"


class Vocabulary:
    """The tokens of an API's model.

    For the endpoint `chat` the tokenizer is given a chat template of its own, which writes only the roles and the texts
    of a conversation: how the API writes them is unknown, and its prompts are sent as turns.

    Attributes:
        tokenizer: the tokenizer.
        end: the token that ends an answer.
        ends: all tokens that end a text.
        contents: the bytes of each token; b"" for control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, endpoint: Endpoint) -> None:
        """Prepare a tokenizer, which is changed.

        Raises:
            OwnerError: it has no token that ends a text, or is of an unknown kind.
        """
        end = end_of_turn(tokenizer) if endpoint == "chat" else None
        end = tokenizer.eos_token_id if end is None else end
        if end is None:
            raise OwnerError("the API's tokenizer has no token that ends a text (eos_token): set one.")
        self.end, self.ends = int(end), tuple(sorted({end, tokenizer.eos_token_id or end}))
        self._roles: dict[int, Role] = {}
        tokenizer.chat_template = None
        if endpoint == "chat":
            tokenizer.add_special_tokens({"additional_special_tokens": list(ROLES.values())})
            closing = tokenizer.convert_ids_to_tokens(self.end)
            tokenizer.chat_template = _template(closing)
            self._roles = {int(tokenizer.convert_tokens_to_ids(name)): role for role, name in ROLES.items()}
        self.tokenizer = tokenizer
        self._strips = "Strip(" in _decoder(tokenizer)
        self.contents = _contents(tokenizer)

    @classmethod
    def load(cls, name: str, endpoint: Endpoint) -> Vocabulary:
        """Load a tokenizer by name.

        Raises:
            OwnerError: it cannot be found or read, or its kind is unknown.
        """
        return cls(_load(name), endpoint)

    @cached_property
    def _by_content(self) -> dict[bytes, int]:
        # Of several tokens with the same bytes the one for a single byte is the fallback, which no text needs.
        names = self.tokenizer.convert_ids_to_tokens(range(len(self.contents)))
        order = sorted(range(len(names)), key=lambda i: (not _is_byte(str(names[i])), -i))
        return {self.contents[i]: i for i in order if self.contents[i]}

    @cached_property
    def _controls(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        return {str(token.content): int(i) for i, token in added.items() if not self.contents[i]}

    def find(self, token: Named) -> int | None:
        """Return the id of a token of an answer; None if this vocabulary does not have it."""
        if token.id is not None:
            known = 0 <= token.id < len(self.contents)
            return token.id if known and self.contents[token.id] == token.content else None
        if token.content:
            number = self._by_content.get(token.content)
            return self._controls.get(token.name) if number is None else number
        return self._controls.get(token.name, self.end if not token.name else None)

    def split(self, token: Named) -> list[int]:
        """Return the ids of a token of an answer, or of the tokens of a character; [] if there are none."""
        number = self.find(token)
        if number is None and token.id is not None and 0 <= token.id < len(self.contents):
            last = self.contents[token.id]
            if last and token.content.endswith(last):
                before = token.content[: -len(last)]
                parts = [before] if before in self._by_content else [bytes([byte]) for byte in before]
                numbers = [self._by_content.get(part) for part in parts]
                return [] if None in numbers else [*(n for n in numbers if n is not None), token.id]
        return [] if number is None else [number]

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; an incomplete character at its end is left out."""
        return b"".join(self.contents[token] for token in tokens).decode("utf-8", "ignore")

    def prompt(self, tokens: Sequence[int]) -> str | tuple[Turn, ...]:
        """Return the prompt that tokens stand for: a text, or the turns of a chat.

        Raises:
            DataError: it contains a control token, which an API reads as text.
        """
        turns: list[tuple[Role, list[int]]] = []
        rest: list[int] = []
        for place, token in enumerate(tokens):
            if token in self._roles:
                rest = []
                turns.append((self._roles[token], rest))
            elif self.contents[token]:
                rest.append(token)
            elif not (turns or not rest) or (place and token not in self.ends):
                name = str(self.tokenizer.convert_ids_to_tokens(token))
                raise DataError(
                    f"a prompt contains the control token {short(name)}, which the API reads as text: write the "
                    "template without it."
                )
        if not self._roles:
            text = self.text(rest)
            return text[1:] if self._strips and text.startswith(" ") else text
        return tuple(Turn(role, self.text(content)) for role, content in turns if role != "assistant" or content)

    def last_border(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens, from the first one on, that end at the border of a character."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        decoder.decode(b"".join(self.contents[token] for token in tokens))
        rest, count = len(decoder.getstate()[0]), len(tokens)
        while rest > 0:
            count -= 1
            rest -= len(self.contents[tokens[count]])
        return count

    def borders(self, tokens: Sequence[int]) -> Iterator[str]:
        """Yield the text of the first 0, 1, ... len(tokens) tokens."""
        content = b""
        yield ""
        for token in tokens:
            content += self.contents[token]
            yield content.decode("utf-8", "ignore")


def _template(closing: str) -> str:
    """Return the chat template that writes roles and texts."""
    names = json.dumps(ROLES)
    end = json.dumps(closing)
    return (
        f"{{% set names = {names} %}}{{% for m in messages %}}{{{{ names[m['role']] + m['content'] }}}}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {end} }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ names['assistant'] }}{% endif %}"
    )


def _load(name: str) -> PreTrainedTokenizerBase:
    if name.startswith(TIKTOKEN):
        return _of_tiktoken(name.removeprefix(TIKTOKEN))
    gguf = gguf_file(name)
    folder = name
    if gguf is not None:
        content = PACKAGED[name].sha256 if name in PACKAGED else None
        folder = converted(gguf[0], lambda: [gguf[1]], content, head_only=True)[0]
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and what tokenizers raises
        raise OwnerError(
            f"{name} cannot be loaded as a tokenizer ({short(str(error))}): give a folder with tokenizer.json, a name "
            "on the hub, a GGUF file or tiktoken:NAME."
        ) from error


def _of_tiktoken(name: str) -> PreTrainedTokenizerBase:
    require_library(f"{TIKTOKEN}{name}", "tiktoken", "openai")
    import tiktoken
    from transformers.integrations.tiktoken import convert_tiktoken_to_fast

    try:
        try:
            encoding = tiktoken.get_encoding(name)
        except ValueError:
            encoding = tiktoken.encoding_for_model(name)
    except (KeyError, ValueError, OSError) as error:
        raise OwnerError(f"tiktoken has no encoding {short(name)} at hand: {short(str(error))}.") from error
    with tempfile.TemporaryDirectory(prefix="pema-") as folder:
        convert_tiktoken_to_fast(encoding, folder)
        return PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), eos_token="<|endoftext|>")


def _decoder(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the description of the decoder of a fast tokenizer; "" of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "" if backend is None else repr(backend.decoder)


def _contents(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes of each token.

    Raises:
        OwnerError: the tokenizer is neither of byte-level BPE nor of SentencePiece's kind.
    """
    decoder = _decoder(tokenizer)
    byte_level, pieces = "ByteLevel(" in decoder, SPACE in decoder or "Metaspace(" in decoder
    if not byte_level and not pieces:
        raise OwnerError(
            f"the tokenizer {type(tokenizer).__name__} is neither of byte-level BPE nor of SentencePiece's kind, so "
            "the bytes of its tokens are unknown."
        )
    alphabet = {char: byte for byte, char in bytes_to_unicode().items()}
    added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
    special = set(tokenizer.all_special_ids)
    contents = []
    for i, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if name is None or i in special or (i in added and added[i].special):
            contents.append(b"")
        elif i in added:
            contents.append(str(name).encode("utf-8", "surrogatepass"))
        elif byte_level:
            contents.append(bytes(alphabet[char] for char in name if char in alphabet))
        elif _is_byte(name):
            contents.append(bytes([int(name[3:5], 16)]))
        else:
            contents.append(name.replace(SPACE, " ").encode("utf-8", "surrogatepass"))
    return contents


def _is_byte(name: str) -> bool:
    """Return whether a token is the fallback for a byte, `<0x41>`."""
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
