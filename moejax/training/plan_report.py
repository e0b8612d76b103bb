"""A plan as lines for people."""

from typing import Any

GIB = 2**30


def tell_plan(result: dict[str, Any]) -> list[str]:
    """What `plan_run` found: memory, arithmetic, time, communication, and what all of it rests on."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one device"
    rows, length = result["batch_size"], result["sequence_length"]
    lines = [
        f"{result['name']} on {result['topology']}: {result['devices']} devices ({mesh}), {rows:,} x {length:,} tokens a step, dispatch "
        f"{result['dispatch']}, remat {result['remat']}; compiled in {result['compile_seconds']:.0f} s, not run",
        "",
        *_tell_memory(result),
    ]
    if result["fits"]:
        lines += ["", *_tell_work(result)]
        if result["predicted_step_seconds"] is not None:
            lines += ["", *_tell_time(result), "", *_tell_collectives(result)]
    return [*lines, "", "The model's assumptions:", *(f"  - {one}" for one in result["assumptions"])]


def _tell_memory(result: dict[str, Any]) -> list[str]:
    limit, parts = result["hbm_bytes"], result["bytes_per_device"]
    total = parts["total"]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    if limit is None:
        verdict = "of an unknown memory"
    elif total:
        left = limit - total
        verdict += f", {abs(left) / GIB:.1f} GiB {'left' if left >= 0 else 'too much'} of {limit / GIB:.1f}"
    lines = [f"memory of one device, GiB: {verdict}"]
    shown = parts if result["fits"] else {name: parts[name] for name in ("parameters", "optimizer", "total")}
    return lines + [f"  {name:<14}{size / GIB:>9.2f}" for name, size in shown.items()]


def _tell_work(result: dict[str, Any]) -> list[str]:
    flops = result["flops"]
    lines = [
        f"FLOP a step: {flops['model']:.4g} of the model, attention counted causally; {flops['program']:.4g} in the program's matmuls, "
        "with what is computed again"
    ]
    if flops["compiler"]:
        lines.append(f"  the compiler's own count for one device, a loop's body once: {flops['compiler']:.4g}")
    return lines


def _tell_time(result: dict[str, Any]) -> list[str]:
    hidden = {}
    for wiring, prefix in (("", ""), ("sequential wiring ", "sequential_")):
        for direction in ("forward", "backward"):
            value = result.get(f"{prefix}hidden_all_to_all_{direction}")
            hidden[f"{wiring}{direction}"] = "no all-to-all" if value is None else f"{value:.1%}"
    lines = [
        f"modelled seconds of a step: {result['predicted_step_seconds']:.3f}, {result['predicted_tokens_per_second']:,.0f} tokens/s, "
        f"MFU {result['predicted_mfu']:.1%}; {result['roofline_step_seconds']:.3f} were every instruction as fast as the chip allows",
        f"  cores at work  {result['compute_seconds']:>8.3f}   matmuls at peak {result['flops_seconds']:.3f}, "
        f"HBM {result['hbm_seconds']:.3f}",
        f"  links at work  {result['link_seconds']:>8.3f}   cores waiting for them {result['waiting_seconds']:.3f}",
        "expert all-to-all hidden: " + ", ".join(f"{name} {value}" for name, value in hidden.items()),
    ]
    return lines


def _tell_collectives(result: dict[str, Any]) -> list[str]:
    lines = [f"{'collective':<20}{'axes':<16}{'direction':<10}{'runs':>7}{'GB':>9}{'ms':>9}{'hidden ms':>11}  asynchronous"]
    for row in result["collectives"]:
        lines.append(
            f"{row['kind']:<20}{'+'.join(row['axes']):<16}{row['direction']:<10}{row['runs']:>7}{row['bytes'] / 1e9:>9.2f}"
            f"{row['seconds'] * 1e3:>9.1f}{row['hidden_seconds'] * 1e3:>11.1f}  {'yes' if row['asynchronous'] else 'no'}"
        )
    return lines


def tell_search(rows: list[dict[str, Any]], seconds: float, untried: int) -> list[str]:
    """The plans that a search made, quickest first; a star marks those that no other beats in both time and memory."""
    meshes = [", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) for row in rows]
    width = max(map(len, [*meshes, "mesh"])) + 2
    lines = [
        f"{len(rows)} plans within {seconds:.0f} s, {untried} not tried; * no other is quicker in less memory",
        f"  {'mesh':<{width}}{'remat':<7}{'parts':>6}{'step s':>9}{'MFU':>7}{'GiB':>8}{'hidden fwd':>12}{'bwd':>7}",
    ]
    for row, mesh in zip(rows, meshes, strict=True):
        step = (
            f"{row['predicted_step_seconds']:>9.3f}{row['predicted_mfu']:>7.1%}" if row["predicted_step_seconds"] else f"{'-':>9}{'-':>7}"
        )
        hidden = "".join(
            f"{'-' if row[key] is None else format(row[key], '.0%'):>{width}}"
            for key, width in (("hidden_all_to_all_forward", 12), ("hidden_all_to_all_backward", 7))
        )
        memory = f"{row['bytes_per_device']['total'] / GIB:>8.1f}"
        mark = "*" if row["on_frontier"] else " "
        end = "" if row["fits"] else "  does not fit"
        lines.append(f"{mark} {mesh:<{width}}{row['remat']:<7}{row['accumulation_steps']:>6}{step}{memory}{hidden}{end}")
    return lines
