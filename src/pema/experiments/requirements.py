"""What the methods of an experiment require of a PLM, checked before the first run."""

from __future__ import annotations

from typing import get_args

from pema.errors import ConfigError, OwnerError, PemaError
from pema.evaluation.evaluate import LABEL_ACCURACY
from pema.experiments.experiment import PERPLEXITY, PLM, Experiment, build_method
from pema.methods.contract import Requirement
from pema.owner import contract
from pema.owner.contract import Contexts, GivesProposals, Metered
from pema.owner.local import LocalPLM

REMEDIES: dict[Requirement, str] = {
    "weights": "needs the PLM's weights in this process, and {plm} is run elsewhere: leave it out, or give it a `plm` "
    "of its own that transformers loads",
    "probabilities": "needs the probabilities of all tokens, and {plm} gives the likeliest ones only: leave it out",
    "likelihoods": "chooses by the likelihood of dev targets, which {plm} does not give: give the settings that it "
    "chooses (k of few-shot), or choose by a metric of the texts",
    "teacher": "needs `teacher` contexts, which {plm} does not offer: set contexts = 'predicted'",
    "predicted": "needs `predicted` contexts, which {plm} does not offer: set contexts = 'teacher', without rounds",
}
"""What to say if a PLM lacks something."""


def provided_by(plm: contract.PLM) -> frozenset[Requirement]:
    """Return what a PLM gives beyond greedy texts.

    Raises:
        OwnerError: its owner does not let this key generate texts.
    """
    contexts: tuple[Contexts, ...] = get_args(Contexts)
    if isinstance(plm, LocalPLM):
        return frozenset({"weights", "probabilities", "likelihoods", *contexts})
    if isinstance(plm, GivesProposals) and plm.proposer is not None:
        return frozenset({"teacher"})
    _ = plm.generator  # refuses a key that may not open sessions, or does not get the LM head
    provided: set[Requirement] = {"probabilities", *(mode for mode in contexts if _offers(plm, mode))}
    return frozenset(provided | ({"likelihoods"} if "teacher" in provided else set()))


def require_provided(experiment: Experiment, name: str, provided: frozenset[Requirement]) -> None:
    """Refuse methods, metrics and a choice that require more of a PLM than it provides.

    Args:
        experiment: the experiment.
        name: name of the PLM.
        provided: what it provides.

    Raises:
        ConfigError: names the line, what it requires, and the remedy.
    """
    for line in experiment.lines():
        candidates = [each for each in line.candidates() if each.get(PLM, experiment.plm) == name]
        required: dict[Requirement, str] = {}
        for each in candidates:
            method = build_method(line.method, each)
            required |= dict.fromkeys(method.requires, method.name)
        if candidates and LABEL_ACCURACY in experiment.metrics:
            required.setdefault("probabilities", LABEL_ACCURACY)
        if len(candidates) > 1 and experiment.choice_metric == PERPLEXITY:
            required.setdefault("likelihoods", f"choose_by = '{PERPLEXITY}'")
        for requirement, what in required.items():
            if requirement not in provided:
                raise ConfigError(f"{line.label}: {what} {REMEDIES[requirement].format(plm=name)}.")


def require_suited(experiment: Experiment, name: str, plm: contract.PLM) -> None:
    """Refuse settings of methods that do not suit a PLM; see `Method.require_suited`.

    Raises:
        PemaError: the message begins with the label of the line.
    """
    for line in experiment.lines():
        for each in line.candidates():
            if each.get(PLM, experiment.plm) != name:
                continue
            try:
                build_method(line.method, each).require_suited(plm, experiment.task)
            except PemaError as error:
                raise type(error)(f"{line.label}: {error}") from error


def _offers(plm: contract.PLM, mode: Contexts) -> bool:
    """Return whether the owner lets this key have contexts of this mode."""
    try:
        if isinstance(plm, Metered):
            plm.forecast(mode, [])
    except OwnerError:
        return False
    return True
