"""Privacy spent by DP-SGD, by the accountants of Opacus (an extra)."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator

from pema.errors import ConfigError
from pema.extras import require_library

ACCOUNTANT = "prv"
"""Numerical composition of privacy loss random variables (Gopi, Lee and Wutschitz 2021): a tight upper bound."""


@functools.cache
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the standard deviation of the noise, in clip norms, that keeps `steps` steps within (epsilon, delta).

    Args:
        epsilon: maximum epsilon to spend.
        delta: delta of the guarantee.
        rate: probability that an example is in the batch of a step.
        steps: number of training steps.

    Raises:
        ConfigError: Opacus is not installed, or no noise is large enough.
    """
    with _opacus():
        from opacus.accountants.utils import get_noise_multiplier

        try:
            noise = get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=ACCOUNTANT
            )
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"dp_epsilon={epsilon}, dp_delta={delta} cannot be reached in {steps} steps: {error} "
                "Raise dp_epsilon or train for fewer epochs."
            ) from error
    return float(noise)


def epsilon_spent(noise: float, delta: float, rate: float, steps: int) -> float:
    """Return the epsilon of `steps` steps with that noise multiplier; see `noise_multiplier`.

    Raises:
        ConfigError: Opacus is not installed.
    """
    with _opacus():
        from opacus.accountants import create_accountant

        accountant = create_accountant(mechanism=ACCOUNTANT)
        accountant.history = [(noise, rate, steps)]
        return float(accountant.get_epsilon(delta=delta))


def accountant_name() -> str:
    """Return the name of the accountant and the version of Opacus."""
    with _opacus():
        from opacus import __version__

    return f"{ACCOUNTANT.upper()} of Opacus {__version__}"


@contextlib.contextmanager
def _opacus() -> Iterator[None]:
    require_library("dp_epsilon", "opacus", "private")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
