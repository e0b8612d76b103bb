"""`python -m moejax.evals NAME [--flag value ...]`: asks one question of a model."""

import importlib

from moejax.cli import parse, run_command
from moejax.config import UserError
from moejax.launch import prepare_process

EVALUATIONS = ("lengths", "passkey", "streaming")  # moejax.evals.NAME, with Arguments (an Output) and run(arguments)


def main(argv: list[str]) -> None:
    """Runs the evaluation named first. Raises UserError for a name that is none."""
    name = argv[0] if argv else ""
    if name not in EVALUATIONS:
        raise UserError(f"got evaluation {name!r}; expected `python -m moejax.evals NAME` with NAME one of {', '.join(EVALUATIONS)}")
    module = importlib.import_module(f"moejax.evals.{name}")
    arguments = parse(argv[1:], module.Arguments(), description=module.__doc__)
    from moejax.evals.output import check_output

    check_output(name, arguments)
    module.run(arguments)


if __name__ == "__main__":
    prepare_process()
    run_command(main)
