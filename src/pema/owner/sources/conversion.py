"""Conversion of a GGUF file to a folder of transformers, which reads the weights.

What the file says of its tokenizer (end and begin tokens, whether a text starts with one, the chat template) is taken
from the file itself, since versions of transformers read it differently.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from pema.errors import OwnerError
from pema.extras import installs

logger = logging.getLogger(__name__)

LOCAL = {"local_files_only": True, "trust_remote_code": False}

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens of transformers, and their names in a GGUF file."""

ENDS = ("eos", "eot", "eom")
"""Tokens that end a text, a turn or a message: each ends what the model generates."""

BEGINNERS = ("llama3", "llama-v3", "llama-bpe", "tekken", "chameleon")
"""Pre-tokenisers of llama.cpp that start a text with its begin token unless the file says otherwise."""

PROBE = "Two words,\n  then 12.5 % of  Ünïcödé 😀."
"""A text whose tokens must survive saving and loading."""

FLOATS = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of tensors that are not quantised, and what they are stored as."""

SHARD = "200MB"
"""Size of the files of weights; their checksums are computed in parallel."""


def convert(source: Path, folder: Path, name: str) -> str:
    """Convert a GGUF file.

    Args:
        source: the file, alone in its folder.
        folder: an empty folder for the result.
        name: name of the PLM, for messages.

    Returns:
        A line on the weights: how they were quantised, and what they were widened to.

    Raises:
        OwnerError: the file is damaged or one part of several, or transformers cannot read it.
    """
    file = GGUFFile(source, name)
    model = _model(file)
    _set_ends(file, model)
    model.save_pretrained(folder, max_shard_size=SHARD)
    save_tokenizer(file, folder)
    return file.weights


class GGUFFile:
    """The metadata of a GGUF file.

    Attributes:
        path: the file.
        name: name of the PLM, for messages.
        kinds: names of the types of its tensors, with the number of each.
        sizes: number of weights of each tensor, by its name.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Read the metadata.

        Raises:
            OwnerError: the file is damaged, or one part of several, or the library that reads it cannot be imported.
        """
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise OwnerError(
                f"the library gguf, which reads {name}, cannot be imported ({error}): {installs('gguf')}."
            ) from error
        self.path, self.name = path, name
        try:
            self._reader = GGUFReader(path)
        except Exception as error:  # it raises what numpy raises on a truncated file, and much else
            raise OwnerError(
                f"the GGUF file of {name} is damaged or truncated ({_line(error)}): download it again."
            ) from error
        self.kinds = Counter(tensor.tensor_type.name for tensor in self._reader.tensors)
        self.sizes = {tensor.name: int(tensor.n_elements) for tensor in self._reader.tensors}
        if int(self.get("split.count", 0)) > 1:
            raise OwnerError(
                f"the GGUF file of {name} is one of {self.get('split.count')} parts: join them with "
                "`llama-gguf-split --merge`, and give the result."
            )

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401
        """Return a value of the metadata."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def token_id(self, kind: str) -> int | None:
        """Return the number of a special token, or None."""
        value = self.get(f"tokenizer.ggml.{kind}_token_id")
        return None if value is None else int(value)

    @property
    def begins(self) -> bool:
        """Whether every text starts with the begin token."""
        usual = self.get("tokenizer.ggml.model") == "llama" or self.get("tokenizer.ggml.pre") in BEGINNERS
        return bool(self.get("tokenizer.ggml.add_bos_token", usual)) and self.token_id("bos") is not None

    @property
    def ends(self) -> bool:
        """Whether every text ends with the end token."""
        return bool(self.get("tokenizer.ggml.add_eos_token", False)) and self.token_id("eos") is not None

    @property
    def end_tokens(self) -> list[int]:
        """Numbers of all tokens that end a text, a turn or a message, in order."""
        return sorted({number for kind in ENDS if (number := self.token_id(kind)) is not None})

    def tensor(self, name: str) -> Any:  # noqa: ANN401
        """Return a tensor of the library gguf, in the blocks in which it is stored, or None."""
        return next((tensor for tensor in self._reader.tensors if tensor.name == name), None)

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(int(tensor.n_bytes) for tensor in self._reader.tensors)

    @property
    def scales_rotation(self) -> bool:
        """Whether rotary frequencies are scaled."""
        architecture = self.get("general.architecture")
        scaling = self.get(f"{architecture}.rope.scaling.type", "none")
        factors = [t for t in self._reader.tensors if t.name.startswith("rope_") and (t.data != 1).any()]
        return scaling != "none" or bool(factors)

    @property
    def dtype(self) -> torch.dtype:
        """Type that the weights are stored in.

        Rounding to bfloat16 changes a weight by at most 1/512 of its magnitude, much less than quantisation did, and
        a processor with bfloat16 computes several times faster in it.
        """
        kinds = set(self.kinds)
        if not kinds <= set(FLOATS):
            return torch.bfloat16
        halves = kinds & {"F16", "BF16"}
        return FLOATS[halves.pop()] if len(halves) == 1 else torch.bfloat16 if halves else torch.float32

    @property
    def weights(self) -> str:
        """A line on the weights."""
        quantised = [kind for kind, _ in self.kinds.most_common() if kind not in FLOATS]
        stored = str(self.dtype).removeprefix("torch.")
        if not quantised:
            return f"GGUF in {stored}"
        return f"GGUF quantised to {', '.join(quantised)}, widened to {stored}"


def _model(file: GGUFFile) -> PreTrainedModel:
    """Load the model with widened weights, as one that was never quantised."""
    options: dict[str, Any] = {}
    # Newer versions keep the weights in their blocks where a kernel is installed that multiplies them.
    kept_in_blocks = getattr(transformers, "GgufConfig", None)
    if kept_in_blocks is not None:
        options["quantization_config"] = kept_in_blocks(dequantize=True)
    architecture = file.get("general.architecture")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            file.path.parent, gguf_file=file.path.name, dtype=file.dtype, output_loading_info=True, **options, **LOCAL
        )
    except Exception as error:
        raise OwnerError(
            f"transformers cannot read the GGUF file of {file.name}, architecture {architecture!r}: {_line(error)} Use "
            "the transformers folder of the model."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise OwnerError(
            f"transformers finds no {missing[0]} ({len(missing)} weights) in the GGUF file of {file.name}, "
            f"architecture {architecture!r}: use the transformers folder of the model."
        )
    if file.scales_rotation and not _scales_rotation(model):
        raise OwnerError(
            f"the GGUF file of {file.name} scales its rotary frequencies, which this version of transformers does not "
            "read: upgrade transformers, or use the transformers folder of the model."
        )
    read, stored = sum(p.numel() for p in model.parameters()), sum(file.sizes.values())
    if read < sum(size for tensor, size in file.sizes.items() if not tensor.startswith("rope_")):
        logger.warning("%s: transformers reads %d of the %d weights in the GGUF file.", file.name, read, stored)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for name in ("_model_name_or_path", "unk_token_id"):  # only some versions add these
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config._name_or_path = ""
    return model.eval()


def _scales_rotation(model: PreTrainedModel) -> bool:
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(each.get("rope_type", "default") != "default" for each in sets)


def save_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Save the tokenizer of a file, which is alone in its folder, as transformers does.

    Raises:
        OwnerError: transformers cannot read it, or loads another one from the folder.
    """
    tokenizer = _tokenizer(file)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder, **LOCAL)
    if [again(PROBE).input_ids, again.eos_token_id] != [tokenizer(PROBE).input_ids, tokenizer.eos_token_id]:
        raise OwnerError(
            f"the tokenizer of {file.name} does not survive saving: use the transformers folder of the model."
        )


def _tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Load the tokenizer, with special tokens and chat template from the file."""
    try:
        read = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name, **LOCAL)
        backend = read.backend_tokenizer
    except Exception as error:
        raise OwnerError(
            f"transformers cannot read the tokenizer {file.get('tokenizer.ggml.model')!r} in the GGUF file of "
            f"{file.name}: {_line(error)} Use the transformers folder of the model."
        ) from error
    special: dict[str, str] = {}
    for role, kind in SPECIAL.items():
        number = file.token_id(kind)
        if number is not None:
            token = backend.id_to_token(number)
            if token is None:
                raise OwnerError(
                    f"the {kind} token {number} of {file.name} is not in its vocabulary: download it again."
                )
            special[role] = token
    begin = f"{special['bos_token']} " if file.begins else ""
    end = f" {special['eos_token']}" if file.ends else ""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A{end}",
        pair=f"{begin}$A{end} {begin}$B:1{end}",
        special_tokens=[
            (special[role], number)
            for role, used in (("bos_token", begin), ("eos_token", end))
            if used and (number := file.token_id(SPECIAL[role])) is not None
        ],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    template = file.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _set_ends(file: GGUFFile, model: PreTrainedModel) -> None:
    """Set the special tokens of the model's configurations to those of the file."""
    ends = file.end_tokens
    for config in (model.config, model.generation_config):
        config.bos_token_id = file.token_id("bos")
        config.pad_token_id = file.token_id("padding")
        config.eos_token_id = (ends[0] if len(ends) == 1 else ends) or None


def _line(error: Exception) -> str:
    """Return the first line of an error's message, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{(lines[0] if lines else type(error).__name__).rstrip('.')}."
