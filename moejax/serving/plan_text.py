"""A plan of serving as lines for people."""

from typing import Any

GIB = 2**30


def tell_plan(plan: dict[str, Any]) -> list[str]:
    """What `plan_serving` found: memory, tokens/s beside the limit that bandwidth sets, communication, and what all of it rests on."""
    lines = [
        f"{plan['topology']}: {plan['devices']} devices ({name_mesh(plan['mesh'])}{', chosen here' if plan['mesh_chosen_here'] else ''}), "
        f"{plan['batch']:,} rows, a cache of {plan['context']:,} tokens each, {plan['dtype']}; compiled, not run",
        "",
        *_tell_memory(plan),
        "",
        *_tell_program("prefill", plan["prefill"], f"a call of {plan['batch']:,} x {plan['chunk']:,} tokens"),
        "",
        *_tell_program("decode", plan["decode"], f"a token for each of {plan['batch']:,} rows"),
        *_tell_limit(plan["decode"]),
    ]
    return [*lines, "", "The model's assumptions:", *(f"  - {one}" for one in plan["assumptions"])]


def name_mesh(mesh: dict[str, int]) -> str:
    """As `expert 8, tensor 8`."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device"


def _tell_memory(plan: dict[str, Any]) -> list[str]:
    parts, limit = plan["bytes_per_device"], plan["hbm_bytes"]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    if limit is None:
        verdict = "of an unknown memory"
    else:
        left = limit - parts["total"]
        verdict += f", {abs(left) / GIB:.2f} GiB {'left' if left >= 0 else 'too much'} of {limit / GIB:.2f}"
    lines = [f"memory of one device, GiB: {verdict}"]
    lines += [f"  {name:<14}{size / GIB:>9.3f}" for name, size in parts.items() if size is not None]
    if "nearest_mesh" in plan:
        lines.append(_tell_nearest(plan["nearest_mesh"], plan["devices"], plan["hbm_bytes"]))
    return lines


def _tell_nearest(nearest: dict[str, Any], devices: int, limit: int) -> str:
    if nearest["fits"]:
        flags = " ".join(f"--mesh.{axis} {size}" for axis, size in nearest["mesh"].items())
        return f"the nearest that fits: {flags} ({nearest['needed_bytes'] / GIB:.2f} GiB)"
    least = nearest["least_weights_and_cache_bytes"]
    return (
        f"no mesh of {devices} devices was found that fits: weights and cache alone take {least / GIB:.2f} GiB of {limit / GIB:.2f}; "
        "use more or larger devices, fewer rows, a smaller --plan-context or --cache.dtype int8"
    )


def _tell_program(name: str, program: dict[str, Any], of_what: str) -> list[str]:
    start = f"{name} (dispatch {program['dispatch']}, compiled in {program['compile_seconds']:.0f} s)"
    if not program["fits"] and "collectives" not in program:
        return [f"{name} (dispatch {program['dispatch']}): the compiler refuses what does not fit; no time is known"]
    if program.get("predicted_seconds") is None:
        return [f"{start}: no time is known"]
    rate, seconds, waiting = (program[key] for key in ("predicted_tokens_per_second", "predicted_seconds", "waiting_seconds"))
    lines = [f"{start}: {rate:,.0f} tokens/s, {seconds * 1e3:,.2f} ms {of_what}, of which {waiting * 1e3:,.2f} ms waiting for links"]
    for row in program["collectives"]:
        if row["seconds"] > 0.01 * seconds:
            where = f"{row['kind']} over {'+'.join(row['axes'])}"
            lines.append(f"  {where:<36}{row['runs']:>5} runs{row['bytes'] / 1e9:>9.3f} GB{row['seconds'] * 1e3:>9.2f} ms")
    return lines


def _tell_limit(decode: dict[str, Any]) -> list[str]:
    limit, read = decode["bandwidth_limit_tokens_per_second"], decode["bytes_to_read"]
    if limit is None:
        return []
    share = decode.get("fraction_of_bandwidth_limit")
    reached = f", {share:.1%} of it reached" if share is not None else ""
    return [
        f"  limit by HBM's bandwidth {limit:,.0f} tokens/s{reached}: a device reads {read['total'] / 1e9:.2f} GB a token, "
        f"{read['cache'] / 1e9:.2f} of them cache"
    ]
