"""A plan of serving as lines for people."""

from typing import Any

from moejax.sharding import MESH_AXES


def describe_plan(plan: dict[str, Any]) -> list[str]:
    """The result of `plan_serving` as a short table, what does not fit by how much, and which mesh does."""
    total, room = plan["bytes_per_device"]["total"], plan["hbm_bytes"]
    chosen = ", chosen here" if plan["mesh_chosen_here"] else ""
    lines = [
        f"compiled for {plan['topology']}, not run: {plan['devices']} devices ({name_mesh(plan['mesh'])}{chosen}), {plan['batch']} rows, "
        f"a cache of {plan['context']:,} tokens a row, {plan['dtype']}",
        "",
        *_tell_bytes(plan["bytes_per_device"]),
    ]
    if room is not None:
        left = room - total
        verdict = f"fits, {left / 1e9:,.1f} GB to spare" if plan["fits"] else f"DOES NOT FIT, {-left / 1e9:,.1f} GB too much"
        lines.append(f"memory     {verdict} ({total / room:.0%} of {room / 1e9:,.1f} GB)")
    lines += [*_tell_program("prefill", plan["prefill"], f"a call of {plan['batch']} x {plan['chunk']:,} tokens"), *_tell_decode(plan)]
    if "nearest_mesh" in plan and room is not None:
        lines.append(_tell_nearest(plan["nearest_mesh"], plan["devices"], room))
    return lines


def name_mesh(mesh: dict[str, int]) -> str:
    """As `expert 8, tensor 8`: the axes above 1."""
    return ", ".join(f"{axis} {mesh[axis]}" for axis in MESH_AXES if mesh[axis] > 1) or "one device"


def _tell_bytes(parts: dict[str, int | None]) -> list[str]:
    known = [f"{name} {size / 1e9:,.2f}" for name, size in parts.items() if name != "total" and size is not None]
    return [f"GB/device  {' + '.join(known)} = {(parts['total'] or 0) / 1e9:,.2f}"]


def _tell_program(name: str, program: dict[str, Any], of_what: str) -> list[str]:
    if program.get("predicted_seconds") is None:
        return [f"{name:<10} compiled in {program['compile_seconds']:.0f} s; no time is known"]
    rate, seconds, waiting = (program[key] for key in ("predicted_tokens_per_second", "predicted_seconds", "waiting_seconds"))
    return [f"{name:<10} {rate:,.0f} tokens/s: {seconds * 1e3:,.2f} ms {of_what}, {waiting * 1e3:,.2f} ms of it waiting for links"]


def _tell_decode(plan: dict[str, Any]) -> list[str]:
    decode = plan["decode"]
    lines = _tell_program("decode", decode, f"for a token in each of {plan['batch']} rows")
    limit, read = decode["bandwidth_limit_tokens_per_second"], decode["bytes_to_read"]["total"]
    if limit is not None:
        share = decode.get("fraction_of_bandwidth_limit")
        reached = f", of which {share:.1%} are reached" if share is not None else ""
        lines.append(f"limit      {limit:,.0f} tokens/s by HBM's bandwidth: {read / 1e9:,.2f} GB a device and step{reached}")
    return lines


def _tell_nearest(nearest: dict[str, Any], devices: int, room: int) -> str:
    if nearest["fits"]:
        flags = " ".join(f"--mesh.{axis} {size}" for axis, size in nearest["mesh"].items() if size > 1 or axis == "fsdp")
        return f"nearest    {flags} fits: {nearest['needed_bytes'] / 1e9:,.1f} GB a device"
    least = nearest["least_weights_and_cache_bytes"]
    return (
        f"nearest    no mesh of these {devices} devices was found to fit: weights and cache alone take {least / 1e9:,.1f} GB of "
        f"{room / 1e9:,.1f} GB at least; take more devices, fewer rows, a shorter context, or --cache.dtype int8"
    )
