"""COMET (Rei et al. 2020) of hypotheses, in a separate environment: unbabel-comet still needs transformers 4.

    python3 -m venv comet-env
    comet-env/bin/pip install "unbabel-comet==2.2.7" "setuptools<82"
    comet-env/bin/python reproduction/comet_score.py --examples RESULTS/examples.jsonl RESULTS/*.txt

Writes `comet/NAME.json` for each NAME.txt, in the same folder. `pema evaluate --scores` reads it and checks that it
belongs to the same texts. Instead of --examples (JSON lines with `source` and `target`), --sources and --references
give files with one text per line, plain or gzipped. This file does not import pema.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MODEL = "Unbabel/wmt22-comet-da"


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 file as pema does: only a line feed ends a line."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = raw.decode("utf-8-sig").split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def digest(texts: list[str]) -> str:
    """Return the SHA-256 of the texts; see `pema.evaluation.elsewhere`."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def aligned(path: Path, hypotheses: list[str], references: list[str]) -> None:
    """Refuse a file whose number of lines differs from that of the references."""
    if len(hypotheses) != len(references):
        raise SystemExit(f"{path} has {len(hypotheses)} lines, expected {len(references)}, one per reference.")


def comet_version() -> str:
    """Return the installed version of unbabel-comet."""
    try:
        return version("unbabel-comet")
    except PackageNotFoundError:
        return "unknown"


def load(name: str) -> Any:  # noqa: ANN401
    """Load a COMET model from the hub, or from a checkpoint file."""
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError as error:
        raise SystemExit(
            f'no COMET here ({error}): pip install "unbabel-comet==2.2.7" in its own environment.'
        ) from None
    return load_from_checkpoint(name if Path(name).is_file() else download_model(name))


def texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Read the sources and references."""
    if args.examples is not None:
        rows = [json.loads(line) for line in read_lines(args.examples)]
        return [row["source"] for row in rows], [
            row["target"] if "target" in row else row["targets"][0] for row in rows
        ]
    sources, references = read_lines(args.sources), read_lines(args.references)
    aligned(args.sources, sources, references)
    return sources, references


def main(argv: list[str] | None = None) -> None:
    """Score all files of hypotheses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hypotheses", type=Path, nargs="+", help="generated texts, one per line")
    parser.add_argument("--examples", type=Path, help="JSON lines with source and target")
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--model", default=MODEL, help="a COMET model of the hub, or a checkpoint file")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=0)
    args = parser.parse_args(argv)
    given = (args.examples is not None, args.sources is not None, args.references is not None)
    if given not in ((True, False, False), (False, True, True)):
        parser.error("give --examples, or --sources and --references")
    sources, references = texts(args)
    systems = {path: read_lines(path) for path in args.hypotheses}
    for path, hypotheses in systems.items():
        aligned(path, hypotheses, references)
    model = load(args.model)
    # A checkpoint file is named by its digest, so that results contain no path of this machine.
    called = args.model
    if Path(called).is_file():
        called = f"{Path(called).name}@{hashlib.sha256(Path(called).read_bytes()).hexdigest()[:12]}"
    for path, hypotheses in systems.items():
        rows = zip(sources, hypotheses, references, strict=True)
        samples = [{"src": source, "mt": hypothesis, "ref": reference} for source, hypothesis, reference in rows]
        scored = model.predict(
            samples, batch_size=args.batch_size, gpus=args.gpus, accelerator="auto" if args.gpus else "cpu"
        )
        result = {
            "metric": "comet",
            "value": float(scored.system_score),
            "segments": [float(score) for score in scored.scores],
            "signature": f"COMET|model:{called}|version:{comet_version()}",
            "hypotheses_sha256": digest(hypotheses),
            "references_sha256": digest(references),
            "sources_sha256": digest(sources),
        }
        output = path.parent / "comet" / f"{path.stem}.json"
        output.parent.mkdir(exist_ok=True)
        partial = output.with_name(output.name + ".partial")
        partial.write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(output)
        print(f"{output}: {result['value']:.4f}")


if __name__ == "__main__":
    main()
