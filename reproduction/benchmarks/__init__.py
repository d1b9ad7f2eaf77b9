"""What pema costs, measured against what it cannot cost less than: `python -m reproduction.benchmarks`, `make bench`.

Each benchmark runs in a process of its own, and each of its parts once more in another, for its peak memory. Results go
to `reproduction/results/benchmarks.jsonl`, one line a benchmark, with the signature of the run.
"""
