"""`python -m moejax.bench NAME [--flag value ...]`: runs one benchmark."""

import importlib

from moejax.cli import parse, run_command
from moejax.config import UserError
from moejax.launch import prepare_process

BENCHMARKS = (
    "train", "moe", "decode", "prefill", "startup", "growth", "convert", "data", "save", "storage_order",
    "tpu_compile", "tpu_prompt", "gpu",
)  # fmt: skip


def main(argv: list[str]) -> None:
    """Runs the benchmark named first. Raises UserError for a name that is none."""
    name = argv[0] if argv else ""
    if name not in BENCHMARKS:
        raise UserError(f"got benchmark {name!r}; expected `python -m moejax.bench NAME` with NAME one of {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"moejax.bench.{name}")
    arguments = parse(argv[1:], module.Arguments(), description=module.__doc__)
    from moejax.bench.output import Output, check_output

    if isinstance(arguments, Output):
        check_output(name, arguments)
    import jax

    # Seconds of compiling are those of compiling, not of finding what an earlier run compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    module.run(arguments)


if __name__ == "__main__":
    prepare_process()
    run_command(main)
