"""Decoding settings of a comparison: the same for all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pema.errors import ConfigError
from pema.generation.config import GenerateConfig
from pema.owner.contract import GivesProposals
from pema.tasks.target_statistics import TargetStatistics

if TYPE_CHECKING:
    from pema.owner.contract import PLM
    from pema.tasks.example import Example
    from pema.tasks.template import Template

ELSEWHERE = {
    "schedule": "it is a setting of the method pema: give it in the settings of [[methods]]",
    "lambda_max": "it is a setting of the method pema: give it in the settings of [[methods]]",
    "batch_size": "texts do not depend on it: give it at the top of the file",
}
"""Settings of generation that belong elsewhere in the file, with the remedy."""


def check_decoding(settings: Mapping[str, Any]) -> None:
    """Check the decoding settings of a comparison before anything runs.

    Raises:
        ConfigError: a setting is unknown, out of range or not applicable; the message begins with "decoding".
    """
    try:
        for name, remedy in ELSEWHERE.items():
            if name in settings:
                raise ConfigError(f"{name} is not a setting of [decoding]: {remedy}.")
        config, further = GenerateConfig.split(settings)
        if further:
            from pema.generation.settings import check

            check({"num_beams": config.num_beams, "do_sample": config.do_sample} | further, ends=[0])
    except ConfigError as error:
        raise ConfigError(f"decoding: {error}") from None


def decoding_for(plm: PLM, template: Template, train: Sequence[Example], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return decoding settings with a token limit and stop strings: by default those of the training targets.

    They are what an adapter that learns from these examples stores, so every method of a comparison has them.

    Raises:
        ConfigError: the PLM gives its likeliest tokens only, and a setting needs the probabilities of all.
    """
    from pema.generation.proposed import require_greedy
    from pema.methods.targets import encode
    from pema.tasks.example import one_target_each

    if isinstance(plm, GivesProposals) and plm.proposer is not None:
        try:
            require_greedy(*GenerateConfig.split(settings))
        except ConfigError as error:
            raise ConfigError(f"decoding: {error}") from None
    if settings.get("max_new_tokens") is not None and settings.get("stop") is not None:
        return dict(settings)
    examples = list(one_target_each(train))
    statistics = TargetStatistics.of(
        encode(plm, template, examples).target_lengths, (example.target for example in examples)
    )
    own = {"max_new_tokens": statistics.max_new_tokens, "stop": list(statistics.stop)}
    return own | {name: value for name, value in settings.items() if value is not None}
