"""The picture of the curriculum: what it reads, that it is a picture, and that it appears whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moejax.config import DataConfig, Domain, RunConfig, Stage, TrainConfig
from moejax.training import curriculum_figure
from moejax.training.curriculum_figure import draw_curriculum, read_evaluations


@pytest.fixture
def config():
    domains = tuple(Domain(name, "builtin:sql") for name in ("prose", "code", "sql"))
    stages = (Stage(40_000, {"prose": 3, "code": 1}), Stage(24_000, {"code": 2, "sql": 2}))
    return RunConfig(data=DataConfig(domains=domains, stages=stages, sequence_length=64), train=TrainConfig(batch_size=10))


@pytest.fixture
def directory(tmp_path):
    rows = [{"step": step, "tokens": step * 640, "loss": 3.0} for step in (1, 50, 100)]
    for step in (100, 50):
        for number, domain in enumerate(("prose", "sql")):
            rows.append({"step": step, "tokens": step * 640, "domain": domain, "eval_bits_per_byte": 4 - number - step / 100})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1')
    return tmp_path


def test_evaluations_are_read_by_domain_and_in_order(directory):
    assert read_evaluations(directory) == {"prose": [(32_000, 3.5), (64_000, 3.0)], "sql": [(32_000, 2.5), (64_000, 2.0)]}
    assert read_evaluations(directory / "nowhere") == {}


def open_axes(monkeypatch, directory, config):
    """The two axes as they are saved."""
    figures = []
    monkeypatch.setattr(curriculum_figure, "_save", lambda figure, path: figures.append(figure))
    draw_curriculum(directory, config, directory / "curriculum.png")
    return figures[0], *figures[0].axes


def test_the_picture_shows_the_mixture_and_the_curves(monkeypatch, directory, config):
    figure, mixture, losses = open_axes(monkeypatch, directory, config)
    assert "100 steps, 64 thousand tokens" in figure.get_suptitle()
    areas = [patch.get_data() for patch in mixture.patches]
    assert [[float(high - low) for high, low in zip(area.values, area.baseline, strict=True)] for area in areas] == [
        [75, 0],
        [25, 50],
        [0, 50],
    ]
    scale = 64_000 / float(areas[0].edges[-1])
    assert [float(edge) * scale for edge in areas[0].edges] == pytest.approx([0, 40_000, 64_000])
    curves = {line.get_label().split(":")[0]: line for line in losses.lines if not line.get_label().startswith("_")}
    assert {name: [float(y) for y in line.get_ydata()] for name, line in curves.items()} == {"prose": [3.5, 3.0], "sql": [2.5, 2.0]}
    assert [float(x) * scale for x in curves["sql"].get_xdata()] == pytest.approx([32_000, 64_000])
    colours = dict(zip(("prose", "code", "sql"), (patch.get_facecolor()[:3] for patch in mixture.patches), strict=True))
    from matplotlib.colors import to_rgb

    assert all(to_rgb(line.get_color()) == colours[name] for name, line in curves.items())
    for axes in (mixture, losses):
        assert axes.get_ylabel().endswith("]") and axes.get_legend() is not None
        assert any([float(x) * scale for x in line.get_xdata()] == pytest.approx([40_000] * 2) for line in axes.lines)


def test_the_picture_appears_whole_and_without_evaluations_too(config, directory, tmp_path, monkeypatch):
    path = tmp_path / "curriculum.png"
    draw_curriculum(directory, config, path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG") and whole.endswith(b"IEND\xaeB`\x82")
    draw_curriculum(tmp_path / "nowhere", config, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 5000

    def fail(*arguments):
        raise OSError("no room")

    monkeypatch.setattr(curriculum_figure.os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        draw_curriculum(directory, config, path)
    assert path.read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curriculum.png", "empty.png", "metrics.jsonl"]


def test_a_run_goes_without_matplotlib(tmp_path):
    code = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "from moejax.config import RunConfig\nfrom moejax.training.curriculum_figure import draw_curriculum\n"
        f"draw_curriculum({str(tmp_path)!r}, RunConfig(), {str(tmp_path / 'curriculum.png')!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "no curriculum.png: matplotlib is not installed; pip install matplotlib\n"), (
        result.stderr
    )
    assert list(tmp_path.iterdir()) == []
