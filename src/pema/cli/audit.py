"""`pema audit`: how well an adapter's training examples can be told from others."""

from __future__ import annotations

from typing import Annotated

import typer

from pema.cli.options import AdapterPlace, AsJSON, Seed, integer, show
from pema.privacy.config import REFERENCES


def audit(
    adapter: AdapterPlace,
    members: Annotated[str, typer.Option("--members", help="Memory of examples that it was trained on.")],
    non_members: Annotated[
        str,
        typer.Option("--non-members", help="Memory of examples that it was not trained on, else like the members."),
    ],
    references: Annotated[
        int, integer("--references", "Reference adapters to train for the strongest attack; even, or 0.", least=0)
    ] = REFERENCES,
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Run membership-inference attacks on an adapter: AUC and true-positive rate at few false positives.

    Example: pema audit adapter --members memory --non-members others
    """
    from pema.adapter.store import read_config
    from pema.memory.places import read_manifest

    read_config(adapter)
    for folder in (members, non_members):
        read_manifest(folder)

    from pema.adapter.module import Adapter
    from pema.memory.reader import Memory
    from pema.privacy.audit import audit as attack
    from pema.privacy.audit import summary

    loaded = Adapter.from_pretrained(adapter)
    result = attack(loaded, Memory.open(members), Memory.open(non_members), references=references, seed=seed)
    show(result if as_json else summary(result), as_json)
