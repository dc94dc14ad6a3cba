"""`kimi-cpu plan`: what this machine will do with a model, before downloading or buying."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kimi_cpu.cli import common
from kimi_cpu.cli.terminal import Status, note
from kimi_cpu.errors import UsageError

if TYPE_CHECKING:
    from kimi_cpu.planning.plan import Subject
    from kimi_cpu.planning.routing import Routing

_DEFAULT_MODEL = "k2-thinking"


class _Number(click.FloatRange):
    """A number in a range; NaN is in none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


@click.command(
    epilog="Without PATH it plans Kimi K2 Thinking, of which nothing has to be here; PATH may then "
    "be the folder where it would lie: the disk is measured there, with a file of 1 GB that is "
    "removed at once. Hit rates come from replaying choices of experts through the engine's own "
    "policy: a trace recorded with --trace of `kimi-cpu chat`, or made-up choices (--skew, "
    "--locality), which the output names."
)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", help=f"A model by its known shape: {_DEFAULT_MODEL}.")
@click.option("--memory", metavar="SIZE,..", help="Amounts of memory, like 16G,64G,128G.")
@click.option(
    "--prompt", "prompt_tokens", type=click.IntRange(1, 1 << 20), default=2048, show_default=True,
    metavar="N", help="Tokens of the prompt that is timed.",
)  # fmt: skip
@click.option(
    "--disk", type=_Number(0.001, 1000), metavar="GB/S",
    help="Take this speed of the disk instead of measuring it.",
)  # fmt: skip
@click.option(
    "--trace", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Routing to replay, as `--trace` recorded it.",
)  # fmt: skip
@click.option(
    "--hit-rate", type=_Number(0, 1), metavar="P",
    help="Assume this part of a token's experts to be in memory.",
)  # fmt: skip
@click.option(
    "--skew", type=_Number(0, 1.5), metavar="S",
    help="Assume popularity ~ rank^-S; 0 is even routing.  [default: 0.6]",
)  # fmt: skip
@click.option(
    "--locality", type=_Number(0, 0.9), metavar="P",
    help="Assume that this part of choices repeats recent ones.  [default: 0.3]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Draw rates by memory to FILE, .svg or .png.",
)  # fmt: skip
def command(
    path: Path | None, model: str | None, memory: str | None, prompt_tokens: int,
    disk: float | None, trace: Path | None, hit_rate: float | None, skew: float | None,
    locality: float | None, as_json: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Predict speed and memory of a model on this machine."""
    if plot is not None:
        from kimi_cpu.cli import bench_plot

        bench_plot.check(plot)
    sizes = _sizes(memory)
    subject = _subject(path, model)
    try:
        routing = _routing(subject, trace, hit_rate, skew, locality)
        from kimi_cpu.cli import plan_report
        from kimi_cpu.planning.plan import make_plan

        common.compile_kernels()
        status = Status()
        try:
            made = make_plan(
                subject, routing, sizes, prompt_tokens=prompt_tokens,
                disk=None if disk is None else disk * 1e9, progress=status.show,
            )  # fmt: skip
        finally:
            status.clear()
    finally:
        if subject.checkpoint is not None:
            subject.checkpoint.close()
    if as_json:
        verdict = plan_report.verdict(made)
        click.echo(json.dumps({"verdict": verdict, **made.as_dict()}, indent=2))
    else:
        click.echo(plan_report.text(made))
    if plot is not None:
        from kimi_cpu.cli import plan_plot

        plan_plot.draw(made, plot)
        note(f"Drawn to {plot}.")


def _sizes(memory: str | None) -> list[int]:
    from kimi_cpu.store.experts.budget import parse_size

    if memory is None:
        return []
    sizes = sorted({parse_size(part) for part in memory.split(",") if part.strip()})
    if not sizes or sizes[0] < 1 << 20:
        raise UsageError(f"--memory {memory!r}: no amounts of memory", "Write it like 16G,64G.")
    return sizes


def _subject(path: Path | None, model: str | None) -> Subject:
    """What is planned: PATH's checkpoint or config, else a model by its known shape."""
    from kimi_cpu.config import ModelConfig
    from kimi_cpu.planning.plan import subject_of
    from kimi_cpu.planning.shape import KNOWN, known_config
    from kimi_cpu.store.checkpoint import INDEX_NAME, MANIFEST_NAME, SINGLE_NAME, Checkpoint

    folder = (path or Path()).expanduser()
    if folder.is_file():
        raise UsageError(f"{folder} is a file", f"Name its folder: {folder.parent}")
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}",
            "PATH is a model's folder, or where Kimi K2 would lie. For another disk: --disk GB/S",
        )
    has_config = (folder / "config.json").exists()
    if model is None and path is not None and has_config:
        weights = (INDEX_NAME, SINGLE_NAME, MANIFEST_NAME)
        if any((folder / name).exists() for name in weights):
            checkpoint = Checkpoint.open(folder)
            name = folder.resolve().name
            return subject_of(name, folder, checkpoint.config, checkpoint)
        return subject_of(folder.resolve().name, folder, ModelConfig.load(folder), None)
    if model is None and path is not None and any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} holds weights but no config.json", "Copy it from the model's repository."
        )
    name = model or _DEFAULT_MODEL
    return subject_of(KNOWN.get(name, name), folder, known_config(name), None)


def _routing(
    subject: Subject, trace: Path | None, hit_rate: float | None, skew: float | None,
    locality: float | None,
) -> Routing:  # fmt: skip
    from kimi_cpu.planning import routing

    shape = subject.shapes[0]
    made_up = skew is not None or locality is not None
    if (trace is not None) + (hit_rate is not None) + made_up > 1:
        raise UsageError(
            "--trace, --hit-rate and --skew/--locality exclude each other", "Give one of them."
        )
    if not shape.n_moe_layers:
        return routing.Even(0, "no routed experts")
    if trace is not None:
        return routing.recorded(trace, shape)
    if hit_rate is not None:
        return routing.Given(hit_rate, shape.all_experts)
    return routing.made_up(
        shape,
        routing.SKEW if skew is None else skew,
        routing.LOCALITY if locality is None else locality,
    )
