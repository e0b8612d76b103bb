"""Evaluations: `python -m moejax.evals NAME`. One file per question asked of a model; each prints a table, and JSON with --json."""

PROGRAM = "python -m moejax.evals"
