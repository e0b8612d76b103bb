"""moejax-report RUN_DIRECTORY: one page of HTML about a run, with its plots inside, that needs no network and no other file.

Of a run in progress, done, or killed. The page is RUN_DIRECTORY/report.html, or --out FILE.
"""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.cli import parse, run_command
from moejax.config import UserError
from moejax.files import write_file
from moejax.training.report_data import RunRecord, read_run
from moejax.training.report_figures import drawing_style
from moejax.training.report_sections import SECTIONS

USAGE = "moejax-report RUN_DIRECTORY [--out FILE]"

STYLE = """
:root { --ink: #1f2630; --soft: #5c6672; --line: #e1e5ea; --accent: #2563a8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); 
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 6px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.soft, figcaption { color: var(--soft); font-size: 14.5px; }
.badge { display: inline-block; padding: 1px 11px; border-radius: 999px; font-size: 14px; font-weight: 600; vertical-align: 5px;
  margin-left: 10px; background: #e7eef7; color: #1d4f88; }
.badge.done { background: #e3f3ea; color: #22683f; } .badge.failed, .badge.stopped { background: #fbe9e6; color: #99352b; }
.badge.interrupted { background: #fbf0df; color: #8a5414; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px; margin: 22px 0 8px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 650; line-height: 1.3; } .tile span { color: var(--soft); font-size: 13.5px; }
figure { background: #fff; border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; padding: 14px 16px 12px; }
figure img { display: block; width: 100%; height: auto; margin: 0 auto; } figcaption { margin-top: 8px; max-width: 92ch; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 0 16px; align-items: start; }
.pair figure img { max-width: 620px; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: 15px; } th, td { text-align: left; padding: 6px 14px;
  border-top: 1px solid var(--line); vertical-align: top; } tr:first-child > * { border-top: 0; }
th { font-weight: 600; white-space: nowrap; } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts th { width: 190px; color: var(--soft); font-weight: 500; } .facts td { overflow-wrap: anywhere; }
pre { background: #1f2630; color: #eef1f5; border-radius: 8px; padding: 12px 16px; white-space: pre-wrap; font-size: 14px; }
pre span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
@media print { body { background: #fff; } figure, .tile { break-inside: avoid; } }
"""


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Writes the page about a run's directory and returns where. Raises UserError for what is no run, and where it cannot be written."""
    record = read_run(directory)
    target = directory / "report.html" if out is None else out
    page = build_page(record)
    try:
        write_file(target, page)
    except OSError as error:
        raise UserError(f"cannot write the report {target}: {error.strerror}; choose another place with --out FILE") from error
    return target


def build_page(record: RunRecord) -> str:
    """The whole page."""
    with drawing_style():
        body = "".join(filter(None, (section(record) for section in SECTIONS)))
    title = html.escape(record.name)
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">\n{view}\n<title>{title}: report of a run</title>\n<style>{STYLE}</style>\n'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n'


def run(argv: list[str]) -> None:
    """Writes the page that the arguments ask for. Raises UserError for a directory that holds no run."""
    arguments = parse(argv, _make_arguments(), description=__doc__)
    if not arguments.run_directory:
        raise UserError(f"a run's directory is needed: {USAGE}")
    out = None if arguments.out is None else Path(arguments.out).expanduser()
    path = write_report(Path(arguments.run_directory).expanduser(), out)
    print(f"{path}: {path.stat().st_size / 1000:,.0f} kB, open it in a browser")


def _make_arguments() -> Any:
    from tyro.conf import Positional

    @dataclass(frozen=True)
    class Arguments:
        """The arguments of moejax-report."""

        run_directory: Positional[str] = ""
        """What train.py writes to, as runs/tiny."""
        out: str | None = None
        """The page; by default report.html in the run's directory."""

    return Arguments()


def main() -> None:
    """The console script."""
    run_command(run)


if __name__ == "__main__":
    main()
