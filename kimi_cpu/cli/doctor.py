"""`kimi-cpu doctor`: is this installation, and this model, set up to run well?"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kimi_cpu.cli import common
from kimi_cpu.cli.terminal import BOLD, RED, Status, printable, styled, width_of
from kimi_cpu.errors import UserError

if TYPE_CHECKING:
    from kimi_cpu.planning.checks import Check

_STYLES = {"ok": "", "warning": BOLD, "problem": RED + BOLD}
_LABELS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


@click.command(
    epilog="Everything is read from the machine now; the kernels are tried on the embedded nano "
    "model, in a process of their own. PATH is KIMI_CPU_MODEL if that is set. Exits with 1 if "
    "something prevents running, else with 0."
)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def command(ctx: click.Context, path: Path | None, as_json: bool) -> None:
    """Check the installation, and a model folder if PATH is given."""
    from kimi_cpu.planning import checks, model_checks

    if path is None and os.environ.get("KIMI_CPU_MODEL"):
        path = Path(os.environ["KIMI_CPU_MODEL"])
    try:
        embedded: Path | None = common.embedded_model()
    except UserError:
        embedded = None
    status = Status()
    try:
        found = checks.installation(embedded, status.show)
        if path is not None:
            of_model = model_checks.model(path.expanduser(), status.show)
            # Of locking, what the model at hand needs is what counts.
            names = {check.name for check in of_model}
            found = [check for check in found if check.name not in names] + of_model
    finally:
        status.clear()
    usable = all(check.state != "problem" for check in found)
    if as_json:
        value = {"usable": usable, "checks": [asdict(check) for check in found]}
        click.echo(json.dumps(value, indent=2))
    else:
        for check in found:
            _show(check)
        click.echo(_summary(found))
    ctx.exit(0 if usable else 1)


def _show(check: Check) -> None:
    """`ok       name        what was found`, wrapped, and what to change below it."""
    label = styled(f"{_LABELS[check.state]:<8}", _STYLES[check.state], sys.stdout)
    indent = " " * 21
    width = max(min(width_of(sys.stdout), 100) - 1, 40)
    lines = _wrapped(check.text, width - len(indent), "")
    lines += _wrapped(check.change, width - len(indent), "-> ")
    click.echo(f"{label} {check.name:<12}{f'{chr(10)}{indent}'.join(lines)}")


def _wrapped(text: str, width: int, mark: str) -> list[str]:
    return textwrap.wrap(
        printable(text), width, initial_indent=mark, subsequent_indent=" " * len(mark),
        break_on_hyphens=False,
    )  # fmt: skip


def _summary(checks: list[Check]) -> str:
    problems = sum(check.state == "problem" for check in checks)
    warnings = sum(check.state == "warning" for check in checks)
    noted = f"{warnings} warning{'s' if warnings != 1 else ''}"
    if problems:
        verb = "prevents" if problems == 1 else "prevent"
        return f"{problems} problem{'s' if problems > 1 else ''} {verb} running; {noted}."
    return f"Ready to run; {noted}." if warnings else "Ready to run."
