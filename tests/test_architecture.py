"""The shape of the project: floors, file sizes, names, what importing costs, and documents that must stay true."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command

PACKAGE = ROOT / "moejax"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "tensorflow", "orbax", "grain")
FORBIDDEN_STEMS = {"utils", "util", "common", "misc", "helpers"}
LONGEST_FILE = 400
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".ipynb", ".cfg", ".txt", ".sh", ""}

# The project speaks of itself alone. Each pattern is written so that it does not match its own line.
LEAKS = {
    "an issue number": re.compile(r"(?<!\]\()(?<![\w&/#\"'])#[0-9]{1,4}\b(?![\w.-])|\bissue #?[0-9]+", re.IGNORECASE),
    "a path of one developer's machine": re.compile(r"(?<![\w.:/])/(?:work|home|root|Users|workspace)/\w"),
    "the circumstances of its writing": re.compile(r"\b(?:this|an earlier|a later|previous) session\b", re.IGNORECASE),
}


def project_files() -> list[Path]:
    """Every file of the project that git tracks or would track; all of them where there is no repository."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True, check=True)
        files = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        kept = ("moejax", "configs", "tests", "docs", "colab")
        files = [*ROOT.glob("*"), *(file for folder in kept for file in (ROOT / folder).rglob("*"))]
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


def text_files() -> list[Path]:
    """The project's own text: not the reference data, which others wrote, nor the licence."""
    own = [file for file in project_files() if not file.is_relative_to(ROOT / "tests" / "golden") and file.name != "LICENSE"]
    return [file for file in own if file.suffix in TEXT_SUFFIXES]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_each_floor_imports_only_from_floors_below():
    linter = Path(sys.executable).with_name("lint-imports")
    result = run_command([linter, "--no-cache"])
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_stay_one_level_deep():
    assert [relative(file) for file in MODULES if len(file.relative_to(PACKAGE).parts) > 2] == []


def test_packages_have_an_init():
    folders = {file.parent for file in MODULES}
    assert [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_file_is_a_drawer_for_anything():
    assert [relative(file) for file in MODULES if file.stem in FORBIDDEN_STEMS] == []


@pytest.mark.parametrize("file", [*MODULES, ROOT / "train.py", ROOT / "sample.py"], ids=relative)
def test_files_tell_one_story(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= LONGEST_FILE, f"{relative(file)} has {len(lines)} lines; at most {LONGEST_FILE}, best under 300: cut it in two"


def test_every_module_says_what_it_is_for():
    files = [
        file for file in [*MODULES, ROOT / "train.py", ROOT / "sample.py", *(ROOT / "configs").glob("*.py")] if file.read_text().strip()
    ]
    assert [relative(file) for file in files if ast.get_docstring(ast.parse(file.read_text())) is None] == []


def test_tests_mirror_the_package():
    """A test file stands where its module stands, so that one finds it without looking."""
    top_level = {
        "test_architecture.py", "test_end_to_end.py", "test_golden.py", "test_golden_capacity.py", "test_golden_mesh.py",
        "test_notebooks.py",
    }  # fmt: skip
    strays = []
    for file in (ROOT / "tests").rglob("test_*.py"):
        path = file.relative_to(ROOT / "tests")
        module = PACKAGE / path.with_name(path.name.removeprefix("test_"))
        parts = module.stem.split("_")  # test_names_export.py may be a second file about names.py
        prefixes = ["_".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if str(path) not in top_level and not any(module.with_name(f"{prefix}.py").exists() for prefix in prefixes):
            strays.append(str(path))
    assert strays == []


@pytest.mark.parametrize("what", LEAKS)
def test_the_project_speaks_of_itself_alone(what):
    found = [
        f"{relative(file)}:{number}: {line.strip()[:120]}"
        for file in text_files()
        if file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if LEAKS[what].search(line)
    ]
    assert found == [], f"{what} in:\n" + "\n".join(found)


def run_python(code: str) -> str:
    result = run_command(["python", "-c", code])
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light():
    loaded = run_python(f"import moejax, sys; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded == "[]"


def test_no_public_name_needs_torch():
    code = "import moejax, sys; [getattr(moejax, name) for name in moejax.__all__]; "
    loaded = run_python(code + "print([name for name in ('torch', 'transformers', 'tensorflow') if name in sys.modules])")
    assert loaded == "[]"


def test_import_takes_at_most_two_seconds_beyond_jax():
    code = "import jax, time; start = time.perf_counter(); import moejax; print(time.perf_counter() - start)"
    seconds = min(float(run_python(code)) for _ in range(3))
    assert seconds <= 2.0


def public_names() -> list[str]:
    return [name for name in run_python("import moejax; print(*moejax.__all__)").split() if not name.startswith("_")]


def test_readme_documents_every_public_name():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in public_names() if not re.search(rf"\bmoejax\.{name}\b|`{name}[`(]", readme)] == []


def test_readme_names_nothing_that_is_not_there():
    readme = (ROOT / "README.md").read_text()
    public = set(public_names())
    submodules = {file.stem for file in PACKAGE.glob("*.py")} | {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    named = set(re.findall(r"(?<![\w/.-])moejax\.([A-Za-z_]\w*)", readme))
    assert named - public - submodules - {"git", "egg"} == set()


def test_architecture_names_every_room():
    picture = (ROOT / "docs" / "architecture.md").read_text()
    folders = sorted({file.parent.name for file in MODULES if file.parent != PACKAGE})
    files = sorted(file.name for file in PACKAGE.glob("*.py"))
    assert [name for name in folders if f"{name}/" not in picture] == []
    assert [name for name in files if name not in picture] == []


def test_architecture_names_no_file_that_is_gone():
    picture = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(moejax/[\w/]+\.py|configs/\w+\.py|docs/\w+\.md)`", picture))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_ci_runs_the_readme_s_test_command():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = [line.strip() for line in readme.splitlines() if line.strip().endswith("-m pytest") and "venv" in line]
    assert commands, "README.md shows no line that sets up an environment and ends with `-m pytest`"
    assert commands[0] in ci
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_dependencies_have_lower_bounds_only():
    """An upper bound or a pin could replace the jax of the runtime moejax is installed into."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    assert [item for item in wanted if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?>=[\d.]+", item)] == []
