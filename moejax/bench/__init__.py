"""Benchmarks: `python -m moejax.bench NAME`. One file per measured thing; each prints a table, and JSON with --json."""

PROGRAM = "python -m moejax.bench"
