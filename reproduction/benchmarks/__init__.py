"""Benchmarks of pema's costs against lower bounds: `python -m reproduction.benchmarks`, `make bench`.

Each benchmark runs in a separate process, and each of its parts again in another, for its peak memory. Results go
to `reproduction/results/benchmarks.jsonl`, one line per benchmark, with the signature of the run.
"""
