"""`python -m moejax.bench NAME [--flag value ...]`: runs one benchmark."""

import importlib

from moejax.cli import parse, run_command
from moejax.config import UserError
from moejax.launch import prepare_process

BENCHMARKS = ("train", "save", "storage_order", "convert", "data", "tpu_compile")


def main(argv: list[str]) -> None:
    """Runs the benchmark named first. Raises UserError for a name that is none."""
    name = argv[0] if argv else ""
    if name not in BENCHMARKS:
        raise UserError(f"got benchmark {name!r}; expected `python -m moejax.bench NAME` with NAME one of {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"moejax.bench.{name}")
    module.run(parse(argv[1:], module.Arguments(), description=module.__doc__))


if __name__ == "__main__":
    prepare_process()
    run_command(main)
