"""The notebooks run from their first cell to their last, and need no other name of moejax than the public ones."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

import moejax
from tests.conftest import ROOT, run_command

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
NOT_RUN = "skip-execution"  # the tag that nbclient goes by, too


def code_cells(path: Path, run_only: bool = True) -> list[str]:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if not (run_only and NOT_RUN in cell["metadata"].get("tags", []))]


def execute(path: Path, folder: Path, **environment: str) -> str:
    """Runs a notebook as Jupyter would where nbclient is installed, else its cells as one script; what it printed."""
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        program = (
            "import sys, nbformat, nbclient\n"
            "notebook, where = nbformat.read(sys.argv[1], 4), {'metadata': {'path': sys.argv[2]}}\n"
            "nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3', resources=where).execute()\n"
            "print(*(o['text'] for c in notebook.cells for o in c.get('outputs', []) if o['output_type'] == 'stream'))\n"
        )
        words = ["python", "-c", program, path, path.parent]
    else:
        script = folder / f"{path.stem}.py"
        script.write_text("\n\n".join(code_cells(path)))
        words = ["python", script]
    result = run_command(words, cwd=path.parent, MOEJAX_NOTEBOOK_OUTPUT=str(folder), MPLBACKEND="agg", **environment)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, str]:
    cache = str(tmp_path_factory.mktemp("compiled"))
    return {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.mark.slow
def test_train(tmp_path, compiled):
    out = execute(ROOT / "colab" / "train.ipynb", tmp_path, MOEJAX_NOTEBOOK_SMALL="1", **compiled)
    assert "step 12/12" in out
    assert "held-out text, bits per byte: {'text': " in out
    assert "share of the tokens in percent" in out or importlib.util.find_spec("matplotlib")
    assert (tmp_path / "tiny" / "checkpoints" / "00000012").is_dir()


@pytest.mark.slow
def test_convert_and_sample(tmp_path, compiled):
    out = execute(ROOT / "colab" / "convert_and_sample.ipynb", tmp_path, **compiled)
    assert "equal to the last bit" in out
    assert "taken back; 1 exchanges are left" in out
    assert "93.41 GB  disk: the published files" in out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_only_public_names_are_used(path):
    tree = ast.parse("\n".join(code_cells(path, run_only=False)))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [name for name in imported if name.startswith("moejax.")] == []
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {node.attr for node in attributes if node.value.id == "moejax"}  # pyright: ignore[reportAttributeAccessIssue]
    assert used and used <= set(moejax.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert [cell for cell in cells if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"])] == []


def test_cells_for_large_machines_do_nothing_by_themselves():
    """Also where a notebook is run with all its cells, tags or not."""
    path = ROOT / "colab" / "convert_and_sample.ipynb"
    skipped = [cell for cell in code_cells(path, run_only=False) if cell not in code_cells(path)]
    assert len(skipped) == 2
    assert "MOEJAX_REAL_8X7B" not in os.environ
    names: dict = {"Path": Path, "os": os}
    before = set(sys.modules)
    for cell in skipped:
        exec(compile(cell, "cell", "exec"), names)
    assert names["ON_TPU_VM"] is False and set(sys.modules) == before
