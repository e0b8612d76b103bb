"""What every command shares: the config file among the arguments, dotted overrides, and errors as one message.

Only the standard library and tyro, and tyro only once there is something to parse: a misspelt flag is answered before
jax is imported, let alone a device touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeVar

from moejax.config import RunConfig, UserError

Arguments = TypeVar("Arguments")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_TRUTH = {"true": True, "false": False}


class ParsedRun(NamedTuple):
    """What `parse_run` found: the run, the file it came from, the command's own flags that were given, and the values of those with one."""

    config: RunConfig
    path: Path
    flags: frozenset[str]
    values: dict[str, str]


class AtOnce(KeyboardInterrupt):
    """The second Ctrl-C, or the second SIGTERM: the process ends without waiting for threads that still write."""


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls `main(argv)` and exits with its status (None is 0).

    A UserError becomes `error: <message>` on stderr and status 2; an interrupt (Ctrl-C, and SIGTERM where a command
    takes it for one) one line and 130; a reader that closed
    our stdout (`| head`) ends the command quietly with 141. Every other exception is a defect and keeps its traceback.
    """
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()  # here, where a closed pipe is still caught, and not while the interpreter shuts down
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
        if isinstance(interrupt, AtOnce):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # the interpreter would wait for every thread
    except BrokenPipeError:
        # What is still buffered would raise again at exit; nobody reads it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_BROKEN_PIPE
    sys.exit(status)


def parse_run(
    argv: Sequence[str],
    default_path: str | Path,
    flags: Mapping[str, str] | None = None,
    complete: Callable[[RunConfig], RunConfig] | None = None,
) -> ParsedRun:
    """Reads `[CONFIG.py] [--flag] [--section.field value ...]`, the config file anywhere among the flags.

    `default_path` is the config used when none is named; `flags` maps each flag of the command itself (`"--summary"`) to
    its line of help, one that takes a value being named with it (`"--plan TOPOLOGY"`), in brackets where it may be left out.
    `complete` may fill in what the file leaves open, before flags have their say: it gets the file's config with the run's name and
    directory and `init_from` as the flags set them. Raises UserError for a config that is missing or wrong, an unknown flag and values
    that cannot work together; exits with status 0 after `--help`, and 2 after tyro's message for a value of the wrong type.
    """
    help_of_flags = dict(flags or {})
    own_flags = {name.partition(" ")[0]: text for name, text in help_of_flags.items()}
    values, rest = _take_values(argv, [name for name in help_of_flags if " " in name])
    given = frozenset(token for token in rest if token in own_flags)
    rest = [token for token in rest if token not in own_flags]
    path, rest = _take_config_path(rest, Path(default_path))
    config, description = load_config(path, Path(default_path).parent)
    if complete is not None and not _wants_help(rest):
        config = complete(_take_whereabouts(rest, config, own_flags))
    program = Path(sys.argv[0]).name
    where = _display(path)
    help_lines = ["config file:", f"  a Python file with config() -> RunConfig, anywhere among the flags; here {where}"]
    if own_flags:
        help_lines += ["", "flags of this command:", *(f"  {name}  {text}" for name, text in help_of_flags.items())]
    help_lines += ["", "example:", f"  python {program} {where} --run-dir runs/mine --train.steps 20 --model.num-experts 4"]
    config = parse(rest, config, description=description, epilogue="\n".join(help_lines), also_known=own_flags)
    return ParsedRun(config, path, given, values)


def _take_values(argv: Sequence[str], flags: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Values of the command's own flags (each `"--plan TOPOLOGY"`), and what is left. Raises UserError for one without a value.

    The value of one in brackets (`"--plan-search [SECONDS]"`) may be left out: it is then empty.
    """
    names = {name: placeholder for name, _, placeholder in (flag.partition(" ") for flag in flags)}
    values, rest, tokens = {}, [], list(argv)
    while tokens:
        name, equals, value = tokens[0].partition("=")
        tokens.pop(0)
        if name not in names:
            rest.append(f"{name}{equals}{value}")
        elif equals:
            values[name] = value
        elif tokens and not tokens[0].startswith("--") and not (names[name].startswith("[") and tokens[0].endswith(".py")):
            values[name] = tokens.pop(0)
        elif names[name].startswith("["):
            values[name] = ""
        else:
            raise UserError(f"{name} needs a value; give {name} {names[name]}")
    return values, rest


def parse(
    argv: Sequence[str],
    default: Arguments,
    *,
    description: str | None = None,
    epilogue: str | None = None,
    also_known: Mapping[str, str] | None = None,
) -> Arguments:
    """`default`, an instance of a dataclass, with the fields that `argv` names replaced.

    Both `--a b` and `--a=b`, hyphens or underscores; a boolean field takes `--a`, `--no-a`, `--a True` and `--a False`.
    `epilogue` ends the help text. Raises UserError for unknown flags, naming the nearest (among `also_known` too), and for
    what the dataclass itself refuses; exits as `parse_run` does.
    """
    import tyro

    known = dict(_known_flags(default))
    wants_help = _wants_help(argv)
    tokens = _normalise(argv, known)
    if not wants_help:
        _refuse_unknown(tokens, known, also_known or {})
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            # The program's name is passed because tyro otherwise prints the whole path of the script.
            parsed = tyro.cli(type(default), default=default, args=tokens, prog=Path(sys.argv[0]).name, description=description)
    except SystemExit as end:
        refused = _user_error_behind(end)
        if refused is not None:
            # tyro draws a box around what a dataclass raised and breaks its lines; the message is ours and stands alone.
            raise refused from None
        sys.stderr.write(messages.getvalue())
        if wants_help and not end.code and epilogue:
            print(epilogue)
        raise
    sys.stderr.write(messages.getvalue())
    return parsed


def _wants_help(argv: Sequence[str]) -> bool:
    return any(token in ("-h", "--help") for token in argv)


def _take_whereabouts(argv: Sequence[str], config: RunConfig, own_flags: Mapping[str, str]) -> RunConfig:
    """The config with what the flags say of where the run lives and starts. Raises UserError for a flag that no field goes by."""
    known = dict(_known_flags(config))
    tokens = _normalise(argv, known)
    _refuse_unknown(tokens, known, own_flags)
    for field in ("name", "run_dir", "init_from"):
        flag = f"--{field.replace('_', '-')}"
        for position, token in enumerate(tokens):
            name, has_value, value = token.partition("=")
            if name.replace("_", "-") == flag and (has_value or position + 1 < len(tokens)):
                config = dataclasses.replace(config, **{field: value if has_value else tokens[position + 1]})
    return config


def load_config(path: Path, configs_directory: Path) -> tuple[RunConfig, str | None]:
    """The RunConfig of a config file, and the file's docstring.

    Raises UserError when the file is missing (naming the nearest in `configs_directory`), fails, or has no `config()`.
    """
    if not path.is_file():
        raise UserError(f"there is no config file {path}{_nearest_config(path, configs_directory)}")
    module = _run_file(path)
    build = getattr(module, "config", None)
    if not callable(build):
        raise UserError(f"{path} has no function config(); a config file defines `def config() -> RunConfig:`")
    with _errors_of(path):
        config = build()
    if not isinstance(config, RunConfig):
        raise UserError(f"config() of {path} returned {type(config).__name__}; expected a moejax.config.RunConfig")
    return config, module.__doc__


def _run_file(path: Path) -> ModuleType:
    name = f"moejax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be read as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass declared in the file looks its own module up
    with _errors_of(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns whatever a config file raises into one UserError that names its line; a UserError passes as it is."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error
    except Exception as error:
        absolute = os.path.abspath(path)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == absolute]
        line = f":{lines[-1]}" if lines else ""
        raise UserError(f"{path}{line}: {type(error).__name__}: {error}{_nearest_field(error)}") from error


def _nearest_field(error: Exception) -> str:
    """For `TypeError: ModelConfig.__init__() got an unexpected keyword argument 'num_exprts'`: the field meant."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not match:
        return ""
    kind = getattr(sys.modules["moejax.config"], match[1], None)
    fields = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    near = difflib.get_close_matches(match[2], fields, n=1, cutoff=0.0)
    return f"; the nearest field is {near[0]}" if near else ""


def _nearest_config(path: Path, directory: Path) -> str:
    candidates = sorted({file for folder in (directory, path.parent) for file in folder.glob("*.py")})
    by_stem = {file.stem: file for file in candidates}
    near = difflib.get_close_matches(path.stem, by_stem, n=1, cutoff=0.0)
    if not near:
        return f", and no other in {directory}"
    return f"; the nearest is {_display(by_stem[near[0]])}"


def _display(path: Path) -> str:
    """The path as one would type it: relative to the working directory where it lies below it."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def _take_config_path(argv: Sequence[str], default_path: Path) -> tuple[Path, list[str]]:
    """Splits the config file, the one positional that ends in .py, from the flags.

    `--data.path x.py` is a flag's value, not a config. Before the config is loaded, only RunConfig's own fields are known,
    which is enough: no file adds fields.
    """
    known = dict(_known_flags(RunConfig()))
    paths, rest = [], []
    for position, token in enumerate(argv):
        before = argv[position - 1] if position else ""
        is_value = before.startswith("--") and "=" not in before and known.get(_flag_name(before, known), True)
        if token.endswith(".py") and not token.startswith("-") and not is_value:
            paths.append(Path(token))
        else:
            rest.append(token)
    if len(paths) > 1:
        raise UserError(f"got {len(paths)} config files ({', '.join(map(str, paths))}); expected one")
    return (paths[0] if paths else default_path), rest


def _flag_name(token: str, known: Mapping[str, bool]) -> str:
    """`--model.scan_layers=True` as `model.scan-layers`, `--no-model.scan-layers` as tyro's `model.no-scan-layers`."""
    name = token.removeprefix("--").partition("=")[0].replace("_", "-")
    section, _, leaf = name.removeprefix("no-").rpartition(".")
    negated = f"{section}.no-{leaf}"
    return negated if name.startswith("no-") and negated in known else name


def _known_flags(config: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Each flag, without its dashes, that tyro derives from a dataclass instance, and whether a value follows it."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _known_flags(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from _known_flags(item, f"{prefix}{name}.{index}.")
        elif isinstance(value, Mapping):
            yield from ((f"{prefix}{name}.{key.replace('_', '-')}", True) for key in value)
        elif isinstance(value, bool):
            yield f"{prefix}{name}", False
            yield f"{prefix}no-{name}", False
        else:
            yield f"{prefix}{name}", True


def _normalise(argv: Sequence[str], known: Mapping[str, bool]) -> list[str]:
    """Brings the spellings of booleans, and values that look like flags, into the one form tyro reads."""
    tokens: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name = _flag_name(token, known)
        if not token.startswith("--") or name not in known:
            tokens.append(token)
        elif not known[name]:
            _, has_value, value = token.partition("=")
            if not has_value and rest and rest[0].lower() in _TRUTH:
                has_value, value = "=", rest.pop(0)
            tokens.append(_boolean_flag(name, value) if has_value else f"--{name}")
        elif "=" not in token and rest and rest[0].startswith("-") and " " in rest[0]:
            tokens.append(f"{token}={rest.pop(0)}")  # --prompt "-- all users": no flag has a space in it
        else:
            tokens.append(token)
    return tokens


def _boolean_flag(name: str, value: str) -> str:
    if value.lower() not in _TRUTH:
        raise UserError(f"--{name}={value} is not a truth value; expected True or False")
    section, dot, leaf = name.rpartition(".")
    positive = leaf.removeprefix("no-")
    is_on = _TRUTH[value.lower()] == (positive == leaf)
    return f"--{section}{dot}{positive}" if is_on else f"--{section}{dot}no-{positive}"


def _refuse_unknown(tokens: Sequence[str], known: Mapping[str, bool], also_known: Mapping[str, str]) -> None:
    """Raises UserError for the first flag that no field goes by, naming the nearest one."""
    flags = [*(f"--{name}" for name in known), *also_known]
    program = Path(sys.argv[0]).name
    for token in tokens:
        flag = f"--{_flag_name(token, known)}"
        if token.startswith("--") and token != "--" and flag not in flags:
            nearest = max(flags, key=lambda other: _likeness(flag, other))
            raise UserError(f"unknown flag {flag}; the nearest is {nearest}. `python {program} --help` lists every flag")


def _likeness(flag: str, other: str) -> float:
    """How near two flags are, in [0, 1]; a forgotten section (`--num-experts`) costs little."""
    whole = difflib.SequenceMatcher(None, flag, other).ratio()
    leaf = difflib.SequenceMatcher(None, flag.lstrip("-").rpartition(".")[2], other.lstrip("-").rpartition(".")[2]).ratio()
    return max(whole, 0.9 * leaf)


def _user_error_behind(error: BaseException) -> UserError | None:
    """The UserError that an exception was raised while handling, if any."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
