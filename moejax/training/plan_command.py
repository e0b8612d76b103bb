"""`train.py --plan`: topology, plan, search, and where they are told."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from moejax.config import RunConfig, UserError
from moejax.files import write_file
from moejax.planning.compiled import describe_versions
from moejax.planning.topology import check_name, open_topology
from moejax.training.plan import plan_run, require_plannable
from moejax.training.plan_report import tell_plan, tell_search
from moejax.training.plan_search import find_fitting, search

SEARCH_SECONDS = 600.0  # of a search, where no other time is asked for
FITTING_SECONDS = 420.0  # spent on looking for what fits, where the run does not


def plan(config: RunConfig, values: dict[str, str], version: str) -> None:
    """Prints the plan of a run; `values` are those of the flags --plan, --plan-search and --plan-json. Raises UserError for bad ones.

    `version`: moejax's own, for the file.
    """
    name, file, seconds = _read_values(values)
    topology = open_topology(name)
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there has no schedule to read
    require_plannable(config, topology)
    if seconds is not None:
        rows, untried = search(config, topology, seconds, lambda line: print(line, file=sys.stderr, flush=True))
        result: dict[str, Any] = {
            "plan": "search",
            "name": config.name,
            "topology": name,
            "seconds": seconds,
            "rows": rows,
            "untried": untried,
        }
        lines = tell_search(rows, seconds, untried)
    else:
        result = plan_run(config, topology)
        lines = tell_plan(result)
        if not result["fits"]:
            print("\n".join(lines), "\n\nlooking for the nearest that fits ...", file=sys.stderr, flush=True)
            nearest = find_fitting(config, topology, FITTING_SECONDS)
            result["nearest_that_fits"] = nearest
            lines += ["", describe_nearest(nearest)]
    if file is not None:
        _write(file, result | {"moejax": version} | describe_versions())
        lines.append(f"written to {file}")
    print("\n".join(lines))


def _read_values(values: dict[str, str]) -> tuple[str, Path | None, float | None]:
    if "--plan" not in values:
        raise UserError(f"{', '.join(values)} belongs to --plan TOPOLOGY; add it, as --plan v5p:8x8x16")
    check_name(values["--plan"])
    seconds = values.get("--plan-search")
    try:
        parsed = None if seconds is None else float(seconds or SEARCH_SECONDS)
    except ValueError:
        raise UserError(f"--plan-search {seconds} is no number of seconds; use one as 900") from None
    if parsed is not None and parsed <= 0:
        raise UserError(f"--plan-search {seconds} must be above 0")
    file = Path(values["--plan-json"]) if "--plan-json" in values else None
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UserError(f"--plan-json {file}: it is a directory, or there is no directory {file.parent}; give a file in one that exists")
    return values["--plan"], file, parsed


def describe_nearest(nearest: dict[str, Any] | None) -> str:
    """A line: what to change so that it fits."""
    if nearest is None:
        return "no mesh or remat policy was found that fits; use more or larger chips, shorter rows or another optimizer"
    flags = [f"--mesh.{axis} {size}" for axis, size in nearest["mesh"].items() if axis != "fsdp"]
    flags += [f"--model.remat {nearest['remat']}", f"--train.accumulation-steps {nearest['accumulation_steps']}"]
    total = nearest["bytes_per_device"]["total"] / 2**30
    step = f", {nearest['predicted_step_seconds']:.3f} s a step" if nearest["predicted_step_seconds"] else ""
    return f"the nearest that fits: {' '.join(flags)} ({total:.1f} GiB{step})"


def _write(file: Path, result: dict[str, Any]) -> None:
    try:
        write_file(file, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); write elsewhere") from error
