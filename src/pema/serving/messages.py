"""The format of requests and JSON answers, from which the OpenAPI description is made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pema.owner.wire import WireDtype

Token = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
"""A token id; whether the vocabulary has it is checked against the PLM."""

_Dtype = Annotated[WireDtype, Field(description="Precision of the representations in the answer.")]


class Message(BaseModel):
    """A body that is parsed strictly: no unknown fields, no numbers in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RepresentRequest(Message):
    """`teacher` contexts: representations whose next token is at starts[i] .. len - 1 of each sequence."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"sequences": [[1, 20, 21, 22], [1, 30, 31]], "starts": [2, 1], "dtype": "float16"}]
        }
    )
    sequences: list[list[Token]] = Field(min_length=1)
    starts: list[Token] = Field(min_length=1)
    dtype: _Dtype = "float32"


class PredictRequest(Message):
    """`predicted` contexts: greedy decoding for at most steps[i] tokens; steps are padded to the bucket."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompts": [[1, 20, 21], [1, 30]], "steps": [8, 16], "dtype": "float16"}]}
    )
    prompts: list[list[Token]] = Field(min_length=1)
    steps: list[Token] = Field(min_length=1)
    dtype: _Dtype = "float32"


class OpenRequest(Message):
    """A decoding session with one row per prompt."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompts": [[1, 20, 21]], "dtype": "float16"}]})
    prompts: list[list[Token]] = Field(min_length=1)
    dtype: _Dtype = "float32"


class AdvanceRequest(Message):
    """One step: row i becomes row parents[i], followed by tokens[i]."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"step": 1, "tokens": [42], "parents": None}]})
    step: int = Field(ge=1, le=(1 << 31) - 1, description="1 for the first; the last one may be sent again.")
    tokens: list[Token] = Field(min_length=1)
    parents: list[Token] | None = Field(
        default=None, description="One current row per new row; null means row i for row i."
    )


class LimitsMessage(BaseModel):
    """Limits of one request; see docs/serving.md."""

    body_bytes: int
    sequence_tokens: int
    batch_sequences: int
    batch_tokens: int
    sessions: int
    session_rows: int
    predict_bucket: int


class QuotaMessage(BaseModel):
    """The rest of one quota of this key; see docs/serving.md."""

    unit: Literal["tokens", "heads"]
    seconds: float = Field(description="Length of the rolling window.")
    limit: int = Field(description="Maximum in the window.")
    left: int = Field(description="What may be spent now.")
    more_in: float = Field(description="Seconds until more may be spent; 0 if nothing is spent.")
    full_in: float = Field(description="Seconds until all of it may be spent again.")


class PLMMessage(BaseModel):
    """Description of the PLM, and what this key may do with it."""

    wire: int
    description: dict[str, Any]
    taps: list[str]
    endpoints: list[str]
    contexts: list[str]
    head: Literal["plain", "masked", "none"]
    dtypes: list[str]
    limits: LimitsMessage
    requests_per_second: float | None
    quotas: list[QuotaMessage] = Field(description="Quotas that have a limit.")


class TokenizerMessage(BaseModel):
    """The tokenizer as `save_pretrained` writes it."""

    files: dict[str, str]


class StatusMessage(BaseModel):
    """Alive, or ready."""

    status: str


class ErrorDetail(BaseModel):
    """The error."""

    code: str = Field(description="Identifies the error for a program.")
    message: str
    remedy: str = Field(description="What to do next.")


class ErrorMessage(BaseModel):
    """The shape of every error."""

    error: ErrorDetail
