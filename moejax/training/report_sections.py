"""The sections of a run's report: each takes a RunRecord and returns HTML, or nothing where the run has nothing to say there."""

import base64
import datetime
import html
from collections.abc import Callable, Iterable
from typing import Any

from moejax.training import report_figures as figures
from moejax.training.report_data import RunRecord, describe_count, describe_seconds

LOSS = "Training loss and learning rate over tokens. The loss is the mean over the targets of the row's own step."
HELD_OUT = "Bits per byte of each domain's held-out text. Lower is better; it does not depend on the tokenizer."
BALANCE = "Balance of the experts' load. The fullest expert's tokens over the mean, and entropy over its maximum: 1 is balanced, in both."
SPEED = "Tokens a second and model FLOPs utilisation (MFU). Time for saving, evaluating and compiling is left out."


def tell_state(record: RunRecord) -> str:
    """Name, state and the last row's figures."""
    word, sentence = record.describe_state()
    last = record.last
    tiles = [
        ("step" + (f" of {record.steps:,}" if record.steps else ""), f"{record.step:,}"),
        ("tokens", describe_count(last["tokens"]) if "tokens" in last else ""),
        ("training loss", _number(last.get("loss"), "{:.3f}")),
        ("tokens/s", _number(last.get("tokens_per_second"), "{:,.0f}")),
        ("MFU", _number(last.get("mfu"), "{:.1%}")),
        ("peak memory", _number(last.get("peak_memory_bytes", 0) / 1e9 or None, "{:.2f} GB")),
        ("goodput", _number(last.get("goodput"), "{:.1%}")),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{html.escape(name)}</span></div>' for name, value in tiles if value)
    nothing = "" if record.rows else "<p>No step has been recorded yet.</p>"
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        f'<h1>{html.escape(record.name)}<span class="badge {word}">{html.escape(word)}</span></h1>\n'
        f'<p class="soft">{html.escape(sentence)} Report written {written} from {html.escape(str(record.directory))}.</p>\n'
        f'<div class="tiles">{shown}</div>\n{nothing}'
    )


def tell_command(record: RunRecord) -> str:
    """The command that goes on with the run."""
    saved = f"The newest checkpoint is that of step {record.checkpoints[-1]:,}." if record.checkpoints else "No checkpoint is there yet."
    command = " ".join(f"<span>{html.escape(word)}</span>" for word in record.command.split(" "))  # lines end between words only
    what = "To train it for longer, raise --train.steps in" if record.describe_state()[0] == "done" else "It goes on with"
    return f"<h2>Going on</h2>\n<p>{saved} {what} the command of its last start:</p>\n<pre>{command}</pre>\n"


def tell_facts(record: RunRecord) -> str:
    """Model, data, devices and versions."""
    model, train, data = record.section("model"), record.section("train"), record.section("data")
    last = record.starts[-1] if record.starts else {}
    rows: list[tuple[str, str]] = []
    if model:
        wiring = ", ".join(filter(None, (
            str(model.get("family", "")), f"{model.get('num_layers')} layers", f"hidden size {model.get('hidden_size')}",
            f"{model.get('num_experts')} experts of width {model.get('intermediate_size')}, {model.get('experts_per_token')} a token",
            f"vocabulary {model.get('vocab_size')}", "dense residual" if model.get("residual_mlp") else "",
        )))  # fmt: skip
        rows.append(("model", wiring))
    if counts := record.counts:
        rows.append(("parameters", f"{counts.total:,}, of which a token meets {counts.active:,}"))
    if model:
        rows.append(("types", f"computed in {model.get('dtype')}, weights in {model.get('param_dtype')}, remat {model.get('remat')}"))
    if train:
        names = ("optimizer", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm", "seed")
        rows.append(
            (
                "optimiser",
                ", ".join(f"{name.replace('_', ' ')} {train[name]}".removeprefix("optimizer ") for name in names if name in train),
            )
        )
        rows.append(("batch", f"{train.get('batch_size')} rows of {data.get('sequence_length')} tokens"))
    if sources := _describe_sources(data):
        rows.append(("data", sources))
    rows += [
        (f"stage {number}", _describe_stage(stage)) for number, stage in enumerate(data.get("stages") or (), 1) if isinstance(stage, dict)
    ]
    if "device" in last:
        teraflops = (last.get("peak_flops_per_second") or 0.0) / 1e12
        peak = f"{teraflops:,.0f}" if teraflops >= 100 else f"{teraflops:.3g}"
        rows.append(("devices", f"{_machine(last)}; peak {peak} TFLOP/s in {last.get('dtype')}, {last.get('peak_source')}"))
    if isinstance(last.get("versions"), dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in last["versions"].items())))
    if not rows:
        return ""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>\n" for name, value in rows)
    return f'<h2>What it is</h2>\n<div class="scroll"><table class="facts">\n{cells}</table></div>\n'


def _describe_sources(data: dict[str, Any]) -> str:
    if data.get("path"):
        return str(data["path"])
    domains = [domain for domain in data.get("domains") or () if isinstance(domain, dict)]
    return ", ".join(f"{domain.get('name')} ({domain['path']})" if "path" in domain else str(domain.get("name")) for domain in domains)


def _describe_stage(stage: dict[str, Any]) -> str:
    weights = stage["weights"] if isinstance(stage.get("weights"), dict) else {}
    mixture = ", ".join(f"{name} {weight / sum(weights.values()):.0%}" for name, weight in weights.items())
    return f"{describe_count(stage['tokens']) if stage.get('tokens') else 'all further'} tokens: {mixture}"


def _figure(record: RunRecord, draw: Callable[[RunRecord], Any], caption: str) -> str:
    """A figure with its caption, the first sentence of which is the alternative text; nothing where there is nothing to draw."""
    drawn = draw(record)
    return "" if drawn is None else _image(figures.encode(drawn), caption)


def _image(address: str, caption: str) -> str:
    text = html.escape(caption)
    alt = html.escape(caption.split(". ")[0].split(": ")[0], quote=True)
    return f'<figure><img src="{address}" alt="{alt}"><figcaption>{text}</figcaption></figure>\n'


def _section(title: str, parts: Iterable[str], introduction: str = "") -> str:
    body = "".join(parts)
    return f"<h2>{title}</h2>\n{introduction}{body}" if body else ""


def tell_learning(record: RunRecord) -> str:
    """Loss, learning rate, and the evaluation of each domain."""
    table = ""
    if record.domains:
        rows = [record.last_evaluation(domain) for domain in record.domains]
        cells = "".join(
            f'<tr><td>{html.escape(row["domain"])}</td><td class="n">{_number(row.get("eval_bits_per_byte"), "{:.4f}")}</td>'
            f'<td class="n">{_number(row.get("eval_loss"), "{:.4f}")}</td><td class="n">{_number(row.get("eval_bytes"), "{:,.0f}")}</td>'
            f'<td class="n">{row["step"]:,}</td></tr>\n'
            for row in rows
        )
        names = "".join(f'<th class="n">{name}</th>' for name in ("bits per byte", "nats a token", "bytes", "at step"))
        head = f"<tr><th>held-out text</th>{names}</tr>"
        table = f'<div class="scroll"><table>\n{head}\n{cells}</table></div>\n'
    return _section("What it has learnt", (
        _figure(record, figures.draw_loss, LOSS),
        _figure(record, figures.draw_evaluation, HELD_OUT),
        table,
    ))  # fmt: skip


def show_mixture(record: RunRecord) -> str:
    """The picture of the curriculum, where the run has drawn one."""
    path = record.directory / "curriculum.png"
    if not path.exists():
        return ""
    picture = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return _section("Mixture", [_image(picture, "The stages' mixture of domains over tokens, and each domain's loss.")])


def show_router(record: RunRecord) -> str:
    """How evenly tokens reach the experts."""
    pair = (
        _figure(record, figures.draw_router, BALANCE),
        _figure(
            record, figures.draw_router_map, "The fullest expert of each MoE layer over tokens. Red layers send too much to one expert."
        ),
    )
    dropped = sum(row["dropped_tokens"] for row in record.rows if figures.is_finite(row.get("dropped_tokens")))
    told = any("dropped_tokens" in row for row in record.rows)
    words = f"<p>{dropped:,.0f} tokens were dropped in the steps that rows tell of.</p>\n" if told else ""
    return _section("Router", [_pair(pair)], words)


def show_stability(record: RunRecord) -> str:
    """Norm of the gradient, steps skipped, memory, goodput."""
    skipped = sum(count for _, count in figures.find_skips(record))
    words = f"{skipped:,} steps were skipped for a gradient that was not finite." if skipped else "No step was skipped."
    known = any("skipped_steps" in row for row in record.rows)
    return _section("Gradients and memory", [_pair((
        _figure(record, figures.draw_gradients, "Norm of the whole gradient before clipping. A line in red: steps were skipped there."),
        _figure(record, figures.draw_memory, "Peak memory of the start, and goodput of all starts so far."),
    ))], f"<p>{words}</p>\n" if known else "")  # fmt: skip


def show_speed(record: RunRecord) -> str:
    """Tokens a second, utilisation, and where time goes."""
    return _section("Speed", [_pair((
        _figure(record, figures.draw_speed, SPEED),
        _figure(record, figures.draw_time, "What the time between two rows went to, in per cent."),
    ))])  # fmt: skip


def show_starts(record: RunRecord) -> str:
    """When the run was started, and what became of it."""
    if not record.starts:
        return ""
    rows = "".join(
        f'<tr><td class="n">{number}</td><td>{_date(start.get("began"))}</td><td class="n">{start["first_step"]:,} to '
        f'{start.get("last_step", 0):,}</td><td class="n">{describe_seconds(start.get("seconds", 0.0))}</td><td>'
        f"{html.escape(str(start.get('ended') or 'gave no end'))}</td><td>{html.escape(_machine(start))}</td></tr>\n"
        for number, start in list(enumerate(record.starts, 1))[-30:]
    )
    head = '<tr><th class="n">start</th><th>began</th><th class="n">steps</th><th class="n">lasted</th><th>end</th><th>on</th></tr>'
    drawn = _figure(
        record, figures.draw_starts, "What the time of each start went to. Steps that a later start did again, after a kill, are apart."
    )
    return _section("Starts", [f'<div class="scroll"><table>\n{head}\n{rows}</table></div>\n', drawn])


def _machine(start: dict[str, Any]) -> str:
    return f"{start.get('devices', 1)} x {start['device']}, {start.get('host', '')}".rstrip(", ") if "device" in start else ""


def _pair(figures: Iterable[str]) -> str:
    shown = "".join(figures)
    return f'<div class="pair">{shown}</div>\n' if shown else ""


def _number(value: Any, form: str) -> str:
    return form.format(value) if figures.is_finite(value) else ""


def _date(seconds: Any) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if isinstance(seconds, int | float) else ""


SECTIONS = (
    tell_state, tell_command, tell_learning, show_mixture, show_router, show_speed, show_stability, show_starts, tell_facts,
)  # fmt: skip
