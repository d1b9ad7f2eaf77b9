"""`pema recover`: the LM head of a model of which an API returns log-probabilities only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import AsJSON, local_path, show
from pema.cli.settings import Options, declared
from pema.owner.logprobs.config import RecoveryConfig

RECOVERING = Options(RecoveryConfig, ("queries", "seed"))


@declared(recovering=RECOVERING)
def recover(
    url: Annotated[
        str,
        typer.Argument(
            help="Address of a server of llama.cpp, or of an OpenAI-compatible one such as vLLM "
            "(with the API key in PEMA_API_KEY); ?model=NAME chooses one of several models.",
            metavar="URL",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="The model's tokenizer: a folder with its files, or a hub name.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            callback=local_path,
            help="Folder for the head bundle and the tokenizer's files.",
            metavar="HEAD",
        ),
    ],
    recovering: dict[str, Any],
    as_json: AsJSON = False,
) -> None:
    """Recover the LM head of a model from log-probabilities of all tokens, for APIs whose terms allow it.

    Then `--plm logprobs+URL#HEAD` builds, trains and generates with the model. The same command continues a recovery
    that was interrupted.

    Example: pema recover http://127.0.0.1:8080 --tokenizer models/mine -o head --queries 800
    """
    from dataclasses import asdict

    from pema.owner.logprobs.recover import recover_head

    result = asdict(recover_head(url, tokenizer, output, **recovering))
    rounded = {"gap": f"{result['gap']:,.1f}", "deviation": f"{result['deviation']:.3%}"}
    rounded |= {"largest_error": f"{result['largest_error']:.2g}", "seconds": f"{result['seconds']:.1f}"}
    show(result if as_json else result | rounded, as_json)
