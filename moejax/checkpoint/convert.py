"""moejax-convert SOURCE DESTINATION [--dtype bfloat16] [--dry-run] [--verify] [--overwrite]: a published model as a checkpoint of moejax.

SOURCE is a directory of a Mixtral or an Arctic model. Memory is that of a few tensors; a conversion that was killed goes on where it
was when the same command is run again.
"""

from dataclasses import dataclass
from typing import Any

from moejax.cli import parse, run_command
from moejax.config import UserError

USAGE = "moejax-convert SOURCE DESTINATION [--dtype bfloat16] [--dry-run] [--verify] [--overwrite]"


def run(argv: list[str]) -> None:
    """Converts as the arguments say. Raises UserError for whatever cannot be converted, before or while it is."""
    arguments = parse(argv, _make_arguments(), description=__doc__)
    if not arguments.source or not arguments.destination:
        raise UserError(f"a source and a destination are needed: {USAGE}")
    from moejax.checkpoint.conversion import convert  # here: a wrong flag is answered before jax is imported

    convert(
        arguments.source,
        arguments.destination,
        arguments.dtype,
        verify=arguments.verify,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        say=lambda text: print(text, flush=True),
    )


def _make_arguments() -> Any:
    from tyro.conf import Positional

    @dataclass(frozen=True)
    class Arguments:
        """The arguments of moejax-convert."""

        source: Positional[str] = ""
        """The directory of a published model."""
        destination: Positional[str] = ""
        """The new checkpoint's directory."""
        dtype: str | None = None
        """Of all weights: float32, bfloat16 or float16; by default that of each in the source."""
        dry_run: bool = False
        """Only say what would be read, written and needed, and whether it fits."""
        verify: bool = False
        """Compare every tensor with its source, bit by bit, before the checkpoint appears."""
        overwrite: bool = False
        """Replace a checkpoint of moejax at the destination."""

    return Arguments()


def main() -> None:
    """The console script."""
    run_command(run)


if __name__ == "__main__":
    main()
