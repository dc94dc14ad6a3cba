"""Write the command line's reference, `kimi_cpu/cli/REFERENCE.md`, from the help texts.

    python tools/dump_cli_help.py           # write it
    python tools/dump_cli_help.py --check   # exit 1 if it is not up to date

A test runs the check, so the reference cannot fall behind.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import click
from click.testing import CliRunner

from kimi_cpu.cli.chat_commands import ALIASES, COMMANDS
from kimi_cpu.cli.main import VERBS, cli

REFERENCE = Path(__file__).resolve().parent.parent / "kimi_cpu" / "cli" / "REFERENCE.md"
WIDTH = 100


def help_of(*args: str) -> str:
    """The help text of a verb, as a terminal of WIDTH columns shows it."""
    os.environ["COLUMNS"] = str(WIDTH)
    result = CliRunner().invoke(
        cli, [*args, "--help"], prog_name="kimi-cpu", terminal_width=WIDTH, color=False
    )
    if result.exit_code:
        raise click.ClickException(result.output)
    return result.output.rstrip()


def reference() -> str:
    """The whole page."""
    parts = [
        "# The command line",
        "Made by `tools/dump_cli_help.py` from the help texts; do not edit.",
        f"```text\n{help_of()}\n```",
    ]
    for verb in VERBS:
        parts += [f"## kimi-cpu {verb}", f"```text\n{help_of(verb)}\n```"]
    rows = [
        f"| `{command.usage.replace('|', chr(92) + '|')}` | {command.help} |"
        for name, command in COMMANDS.items()
        if name not in ALIASES
    ]
    aliases = ", ".join(f"`{alias}` is `{name}`" for alias, name in ALIASES.items())
    parts += [
        "## Commands of the chat",
        "\n".join(["| command | what it does |", "|---|---|", *rows]),
        f"Also: {aliases}. `//text` sends `/text` to the model.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    page = reference()
    if parser.parse_args().check:
        # by words: versions of click break lines differently
        if not REFERENCE.exists() or REFERENCE.read_text("utf-8").split() != page.split():
            print(f"{REFERENCE.name} is out of date: run tools/dump_cli_help.py", file=sys.stderr)
            return 1
        return 0
    REFERENCE.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
