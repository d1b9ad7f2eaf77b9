"""`pema memory info|verify|merge|sample`: inspect and combine external memories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, MemoryPlace, Seed, integer, show
from pema.storage.address import is_address, shown

app = typer.Typer(help="Inspect and combine external memories.", no_args_is_help=True)
Output = Annotated[
    str, typer.Option("-o", "--output", help="Folder for the new memory, or its address.", metavar="MEMORY")
]


@app.command()
def info(memory: MemoryPlace, as_json: AsJSON = False) -> None:
    """Describe a memory: its content, and the PLM it was built with.

    Example: pema memory info memory --json
    """
    from pema.memory.places import read_manifest

    manifest = read_manifest(memory)
    policies = sum(entry.policy is not None for entry in manifest.inputs)
    show(
        {
            "memory": shown(memory),
            "plm": manifest.plm.name,
            **({"plm_weights": manifest.plm.weights} if manifest.plm.weights else {}),
            "plm_fingerprint": manifest.plm.fingerprint,
            "tokenizer_fingerprint": manifest.plm.tokenizer_fingerprint,
            "task": manifest.task,
            "contexts": manifest.contexts,
            "targets": manifest.targets,
            **({} if manifest.agreement is None else {"agreement": round(manifest.agreement, 4)}),
            "tap": manifest.plm.tap,
            "dtype": manifest.dtype,
            "width": manifest.plm.d_tap,
            **({"on_policy_inputs": policies} if policies else {}),
            "examples": manifest.examples,
            "pairs": manifest.pairs,
            "shards": len(manifest.shards),
            "bytes": manifest.bytes,
        },
        as_json,
    )


@app.command()
def verify(
    memories: Annotated[
        list[str], typer.Argument(help="Folders or addresses of external memories.", metavar="MEMORY...")
    ],
    as_json: AsJSON = False,
) -> None:
    """Verify every byte of memories against their manifests.

    Example: pema memory verify memory
    """
    from pema.memory.manifest import Manifest

    for folder in memories:
        if not is_address(folder):
            Manifest.read(Path(folder))

    from pema.memory.verify import verify as verify_memory

    results = []
    for folder in memories:
        report = verify_memory(folder)
        results.append({"memory": shown(folder), "verified_files": report.files, "verified_bytes": report.bytes})
        if not as_json:
            show(results[-1], as_json)
    if as_json:
        show({"verified": results}, as_json)


@app.command()
def merge(
    memories: Annotated[list[str], typer.Argument(help="Memories of one PLM.", metavar="MEMORY...")],
    output: Output,
    as_json: AsJSON = False,
) -> None:
    """Merge memories of one PLM into a new one.

    Example: pema memory merge monday tuesday -o both
    """
    from pema.memory.manifest import refuse_existing
    from pema.memory.places import MEMORY, read_manifest
    from pema.storage.publishing import destination

    with destination(output, MEMORY, anew=True) as new:
        refuse_existing(new)
        for folder in memories:
            read_manifest(folder)

        from pema.memory.merge import merge as merge_memories

        merged = merge_memories(memories, new)
    show({"memory": shown(output), "examples": merged.examples, "pairs": merged.pairs}, as_json)


@app.command()
def sample(
    memory: MemoryPlace,
    output: Output,
    pairs: Annotated[
        int, integer("--pairs", "Maximum number of pairs in the sample; examples stay complete.", least=1)
    ],
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Sample complete examples into a new memory, up to a number of pairs.

    Example: pema memory sample memory --pairs 10000 -o small
    """
    from pema.memory.manifest import refuse_existing
    from pema.memory.places import MEMORY, read_manifest
    from pema.storage.publishing import destination

    with destination(output, MEMORY, anew=True) as new:
        refuse_existing(new)
        read_manifest(memory)

        from pema.memory.sample import sample as sample_memory

        drawn = sample_memory(memory, new, pairs=pairs, seed=seed)
    show({"memory": shown(output), "examples": drawn.examples, "pairs": drawn.pairs}, as_json)
