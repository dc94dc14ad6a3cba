"""`kimi-cpu`: the verbs, and what happens to every error.

The verbs' modules are imported when they are called, so that `kimi-cpu --help` is instant.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import click

from kimi_cpu import __version__
from kimi_cpu.errors import UserError

#: verb -> (module that holds `command`, what it does)
VERBS = {
    "chat": ("kimi_cpu.cli.chat", "Talk with a model; conversations are kept."),
    "run": ("kimi_cpu.cli.run", "Answer one prompt and exit."),
    "serve": ("kimi_cpu.cli.serve", "Serve a model over HTTP, as OpenAI's API."),
    "inspect": ("kimi_cpu.cli.inspect", "Show what a model folder holds and needs."),
    "pull": ("kimi_cpu.cli.pull", "Download a checkpoint from a hub."),
    "repack": ("kimi_cpu.cli.repack", "Convert a checkpoint to the kernels' own format."),
    "plan": ("kimi_cpu.cli.plan", "Predict speed and memory of a model on this machine."),
    "doctor": ("kimi_cpu.cli.doctor", "Check the installation, and a model folder."),
    "bench": ("kimi_cpu.cli.bench", "Measure tokens a second beside what memory allows."),
}

BROKEN_PIPE = 1
INTERRUPTED = 130


class Verbs(click.Group):
    """A group that imports a verb's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS, 1)
            suggestion = f"Did you mean `kimi-cpu {near[0]}`? " if near else ""
            raise click.UsageError(
                f"there is no command `{args[0]}`",
            ) from UserError("", f"{suggestion}To ask something: kimi-cpu run 'YOUR PROMPT'")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Start with:
  kimi-cpu chat
  kimi-cpu run "What is 17 + 25?"

KIMI_CPU_MODEL names a default model folder, KIMI_CPU_HOME where conversations are kept;
NO_COLOR turns colours off.""",
)
@click.version_option(__version__, prog_name="kimi-cpu")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Kimi K2 Thinking, and small models of its architecture, on the CPU you have."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never lets an expected error through.

    0 done, 1 an error, 2 wrong usage, 130 interrupted.
    """
    _prepare_streams()
    if os.name == "nt":
        os.system("")  # switches escape sequences on in old consoles
    try:
        code = cli.main(args=args, prog_name="kimi-cpu", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        _report(error.format_message(), _usage_hint(error))
        return error.exit_code
    except UserError as error:
        _report(error.message, error.hint)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):  # Ctrl-C; click has begun a new line
        return INTERRUPTED
    except SystemExit:  # click met a broken pipe, made stdout quiet and exits
        return BROKEN_PIPE
    except BrokenPipeError:  # the reader left (`| head`)
        _silence(sys.stdout)
        return BROKEN_PIPE
    except Exception as error:
        if os.environ.get("KIMI_CPU_DEBUG"):
            raise
        kind = type(error).__name__
        if isinstance(error, MemoryError):
            _report("out of memory", "Close other programs, or shorten the conversation.")
        elif isinstance(error, OSError):
            _silence(sys.stdout)
            where = f"{error.filename}: " if error.filename else ""
            _report(f"{where}{error.strerror or error}", "Is the disk full, or a file not yours?")
        elif isinstance(error, RuntimeError) and "start new thread" in str(error):
            _report("the system starts no more threads", "Use fewer --threads.")
        else:
            text = " ".join(str(error).split())[:300]
            _report(
                f"unexpected {kind}: {text}",
                "This is a bug. KIMI_CPU_DEBUG=1 shows the traceback to report.",
            )
        return 1
    finally:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            _silence(sys.stderr)


def _prepare_streams() -> None:
    """Streams that can take any text: a closed one is replaced by the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show becomes `?`


def _silence(stream: TextIO) -> None:
    """Writing failed: keep the interpreter from trying again when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _usage_hint(error: click.ClickException) -> str:
    if isinstance(error.__cause__, UserError):
        return error.__cause__.hint
    ctx: Any = getattr(error, "ctx", None)
    return f"Try `{ctx.command_path} --help`." if ctx is not None else ""


def _report(message: str, hint: str) -> None:
    from kimi_cpu.cli.terminal import print_error

    print_error(message, hint)


if __name__ == "__main__":
    sys.exit(main())
