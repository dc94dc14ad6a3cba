"""`kimi-cpu bench`: tokens a second, and what the machine's memory would allow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from kimi_cpu.cli import common
from kimi_cpu.cli.terminal import note
from kimi_cpu.errors import UsageError

if TYPE_CHECKING:
    from kimi_cpu.benchmark.runner import Test


def _numbers(least: int) -> Callable[[click.Context, click.Parameter, str | None], list[int]]:
    """A callback that reads integers separated by commas, none below `least`."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int]:
        if value is None:
            return []
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            raise click.BadParameter(f"{value!r} is no list of numbers like 1,2") from None
        if min(numbers) < least:
            raise click.BadParameter(f"{min(numbers)} is below {least}")
        return list(dict.fromkeys(numbers))

    return read


def _pairs(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[int, int]]:
    """A callback that reads P,N: two positive integers, any number of times."""
    pairs = []
    for value in values:
        parts = value.split(",")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise click.BadParameter(f"{value!r} is no pair like 512,128")
        pairs.append((int(parts[0]), int(parts[1])))
    return pairs


@click.command(
    epilog="Rows are named as llama-bench names them: pp512 computes a prompt of 512 tokens, tg128 "
    "decodes 128 one by one, `@ d4096` does so after 4096 tokens that are not timed. Token ids "
    "come from the seed; tokenising and sampling are left out. Before each row its own tokens are "
    "computed once untimed: the first touch of a mapped file runs at half the speed even when the "
    "file is in memory. Beside each run the memory's bandwidth is measured with plain readers."
)
@click.option("--model", "-m", metavar="PATH", help="Folder of a model in Hugging Face's layout.")
@click.option(
    "--n-prompt", "-p", callback=_numbers(0), default="512", show_default=True, metavar="P,..",
    help="Lengths of prompts; 0 for none.",
)  # fmt: skip
@click.option(
    "--n-gen", "-n", callback=_numbers(0), default="128", show_default=True, metavar="N,..",
    help="Numbers of tokens to decode; 0 for none.",
)  # fmt: skip
@click.option(
    "-pg", "n_pg", multiple=True, callback=_pairs, metavar="P,N",
    help="A prompt of P tokens and N decoded ones timed together; may be repeated.",
)  # fmt: skip
@click.option(
    "--n-depth", "-d", callback=_numbers(0), default="0", show_default=True, metavar="D,..",
    help="Tokens of context before each test.",
)  # fmt: skip
@click.option(
    "--threads", "-t", callback=_numbers(1), metavar="N,..", help="CPU threads; default: all cores."
)
@click.option(
    "--repetitions", "-r", type=click.IntRange(1), default=5, show_default=True, metavar="N",
    help="Runs of each test.",
)  # fmt: skip
@click.option(
    "--output", "-o", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md",
    show_default=True, help="Format on stdout.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fast", "exact"]), default="fast", show_default=True,
    help="int8 activations, or float32 as the reference computes.",
)  # fmt: skip
@common.store_options
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Of the token ids.")
@click.option("--cold", is_flag=True, help="Before each run drop the weight files from memory.")
@click.option("--profile", is_flag=True, help="Split a token's time by part of the model.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Draw rates by context depth and the split to FILE, .svg or .png (implies --profile).",
)  # fmt: skip
def command(
    model: str | None, n_prompt: list[int], n_gen: list[int], n_pg: list[tuple[int, int]],
    n_depth: list[int], threads: list[int], repetitions: int, output: str, precision: str,
    memory: int | None, io: str, seed: int, cold: bool, profile: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Measure tokens a second beside what memory allows."""
    from kimi_cpu.cli import bench_plot

    if plot is not None:
        bench_plot.check(plot)
    folder = common.model_folder(model)
    from kimi_cpu import hardware
    from kimi_cpu.benchmark.runner import Bench, Test, count_steps
    from kimi_cpu.cli import bench_report as report

    tests = _tests(Test, n_prompt, n_gen, n_pg, n_depth)
    thread_counts = threads or [hardware.default_threads()]
    common.compile_kernels()
    common.watch_weight_files()
    steps = count_steps(len(tests), len(thread_counts), repetitions)
    records: list[dict[str, Any]] = []
    with tqdm(
        total=steps,
        desc="starting",
        disable=None,
        leave=False,
        file=sys.stderr,
        bar_format=_BAR,
        mininterval=0,
    ) as bar:

        def progress(text: str, complete: bool) -> None:
            bar.set_description_str(text, refresh=not complete)
            bar.update(complete)

        def show(text: str) -> None:
            with tqdm.external_write_mode(file=sys.stdout):
                click.echo(text)

        bench = Bench(
            folder, precision=precision, seed=seed, repetitions=repetitions,  # type: ignore[arg-type]
            memory=memory, io=io,  # type: ignore[arg-type]
            cold=cold, profile=profile or plot is not None, progress=progress,
        )  # fmt: skip
        bench.check(tests)
        name = "nano" if folder in common.embedded_folders() else folder.resolve().name
        if output == "md":
            show(report.md_header())
        for row in bench.run(tests, thread_counts):
            records.append(report.record(row, bench.describe()))
            if output == "md":
                show(report.md_row(records[-1], name))
            elif output == "csv":
                show(report.as_csv(records[-1], header=len(records) == 1))
            elif output == "jsonl":
                show(report.as_jsonl(records[-1]))
    if output == "json":
        click.echo(report.as_json(records))
    elif output == "md":
        click.echo(report.md_footer(records))
    if plot is not None:
        bench_plot.draw(records, name, plot)
        note(f"Drawn to {plot}.")
    largest = max(r["bytes_per_token"] for r in records)
    if output == "md" and largest < _FITS_CACHE_BYTES:
        note(
            "So small a model stays in the CPU's caches: memory does not limit it, and the "
            "share of the ceiling says little."
        )


_BAR = "{desc} |{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"

#: Fewer bytes per token than this may come from a cache instead of memory.
_FITS_CACHE_BYTES = 64 << 20


def _tests(
    make: type[Test], n_prompt: list[int], n_gen: list[int], n_pg: list[tuple[int, int]],
    n_depth: list[int],
) -> list[Test]:  # fmt: skip
    """The rows in llama-bench's order: for each depth all prompts, then decoding, then both."""
    tests = []
    for depth in n_depth:
        tests += [make(p, 0, depth) for p in n_prompt if p]
        tests += [make(0, n, depth) for n in n_gen if n]
        tests += [make(p, n, depth) for p, n in n_pg]
    if not tests:
        raise UsageError("there is nothing to measure", "Give -p, -n or -pg above 0.")
    return tests
