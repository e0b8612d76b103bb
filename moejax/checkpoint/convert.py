"""moejax-convert SOURCE DESTINATION: a published model as a checkpoint of moejax; with --to hf or --to mistral, the other way.

SOURCE is a directory of a Mixtral or an Arctic model, or its id on the Hugging Face Hub; with --to, a checkpoint or a run of moejax.
Memory is that of a few tensors; a conversion that was killed goes on where it was when the same command is run again.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

from moejax.cli import parse, run_command
from moejax.config import UserError

USAGE = (
    "moejax-convert SOURCE DESTINATION [--dtype bfloat16] [--dry-run] [--verify] [--overwrite] [--merge-lora DIR [--lora-scaling X]] "
    "[--revision NAME], or moejax-convert --to hf|mistral SOURCE DESTINATION [--max-shard-size 5GB]"
)
IMPORT_FLAGS = ("dtype", "dry_run", "verify", "overwrite", "merge_lora", "lora_scaling", "revision")


def run(argv: list[str]) -> None:
    """Converts as the arguments say. Raises UserError for whatever cannot be converted, before or while it is."""
    arguments = parse(argv, _make_arguments(), description=__doc__)
    if not arguments.source or not arguments.destination:
        raise UserError(f"a source and a destination are needed: {USAGE}")
    if arguments.to is not None:
        given = [f"--{name.replace('_', '-')}" for name in IMPORT_FLAGS if getattr(arguments, name) not in (None, False)]
        if given or arguments.to not in ("hf", "mistral"):
            what = f"{', '.join(given)} is not for --to" if given else f"--to {arguments.to}: expected hf or mistral"
            raise UserError(f"{what}; use: {USAGE}")
        _write_for_others(arguments.source, arguments.destination, arguments.to, arguments.max_shard_size)
        return
    if arguments.max_shard_size is not None:
        raise UserError(f"--max-shard-size is for --to hf; use: {USAGE}")
    if arguments.lora_scaling is not None and arguments.merge_lora is None:
        raise UserError(f"--lora-scaling needs --merge-lora DIR, the adapter that it scales; use: {USAGE}")
    from moejax.checkpoint.conversion import convert  # here: a wrong flag is answered before jax is imported

    flags = {name: getattr(arguments, name) for name in IMPORT_FLAGS}
    convert(arguments.source, arguments.destination, **flags, say=lambda text: print(text, flush=True))


def _write_for_others(source: str, destination: str, to: str, max_shard_size: str | None) -> None:
    """Exports a checkpoint or a run, and says what was written."""
    from pathlib import Path

    from moejax.checkpoint.export import export
    from moejax.checkpoint.transfer import Progress

    progress = Progress("written", 0)

    def report(done: int, total: int) -> None:
        progress.total = total
        progress.add(done - progress.done)

    export(Path(source).expanduser(), Path(destination).expanduser(), cast(Literal["hf", "mistral"], to), max_shard_size or "5GB", report)
    progress.finish()
    files = sorted(path.name for path in Path(destination).expanduser().iterdir())
    print(
        f"{destination} is complete, {progress.total / 1e9:,.2f} GB of weights: {', '.join(files[:8])}{', ...' if len(files) > 8 else ''}"
    )


def _make_arguments() -> Any:
    from tyro.conf import Positional

    @dataclass(frozen=True)
    class Arguments:
        """The arguments of moejax-convert."""

        source: Positional[str] = ""
        """The directory of a published model, or its id on the Hugging Face Hub; with --to, a checkpoint or a run of moejax."""
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
        merge_lora: str | None = None
        """The directory of a LoRA adapter, of PEFT or of mistral-inference, that is merged into the weights."""
        lora_scaling: float | None = None
        """The factor of the adapter, instead of what its configuration says (mistral-inference: 2)."""
        revision: str | None = None
        """Of a model on the Hub: a branch, a tag or a commit."""
        to: str | None = None
        """hf or mistral: write a checkpoint of moejax for others, as Hugging Face's or as Mistral's files."""
        max_shard_size: str | None = None
        """With --to hf: the largest file, 5GB by default."""

    return Arguments()


def main() -> None:
    """The console script."""
    run_command(run)


if __name__ == "__main__":
    main()
