"""`kimi-cpu repack SRC DST`: a checkpoint into the kernels' own format, and proof that it is."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kimi_cpu.cli import common
from kimi_cpu.cli.inspect import size
from kimi_cpu.cli.terminal import note
from kimi_cpu.errors import UsageError, UserError

if TYPE_CHECKING:
    from tqdm import tqdm

    from kimi_cpu.store.manifest import Rounding
    from kimi_cpu.store.repack import Plan, Report, Verified

ALIGNMENTS = {"4K": 4096, "64K": 65536}


@click.command(
    epilog="SRC is a published checkpoint with INT4 experts, DST a new folder; docs/format.md says "
    "what it will hold. Experts stay bit for bit what they are; the rest becomes int8 in groups of "
    "32 unless --trunk says otherwise, and how far that is from the source is measured and "
    "reported: by tensor, and in what the model predicts if both fit into memory. It can be "
    "interrupted in any way, and the same command goes on from there. With --verify DST is "
    "compared with SRC, or with its checksums alone if SRC is left out."
)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@click.option(
    "--trunk",
    type=click.Choice(["int8", "bf16", "int4"]),
    default="int8",
    show_default=True,
    help="Form of what is no routed expert; bf16 leaves it as published.",
)
@click.option(
    "--align",
    type=click.Choice(list(ALIGNMENTS), case_sensitive=False),
    default="4K",
    show_default=True,
    help="Experts begin at multiples of this.",
)
@click.option("--dry-run", is_flag=True, help="Only show sizes and free space.")
@click.option(
    "--delete-source-shards",
    is_flag=True,
    help="Delete each shard of SRC once what was made of it is verified: saves disk space.",
)
@click.option("--verify", "verifying", is_flag=True, help="Prove that DST is what SRC says.")
@click.option("--threads", "-t", type=click.IntRange(1), metavar="N", help="Default: cores + 2.")
def command(
    src: Path,
    dst: Path | None,
    trunk: str,
    align: str,
    dry_run: bool,
    delete_source_shards: bool,
    verifying: bool,
    threads: int | None,
) -> None:
    """Convert a checkpoint to the kernels' own format."""
    src = src.expanduser()
    if verifying:
        if dry_run or delete_source_shards:
            raise UsageError("--verify only reads", "Leave the other options out.")
        source, folder = (src, dst.expanduser()) if dst is not None else (None, src)
        _verify(_existing(folder), source and _existing(source), threads)
        return
    if dst is None:
        raise UsageError("DST is missing", "kimi-cpu repack SRC DST, DST being a new folder")
    from kimi_cpu.store.repack import LocalShards, Options, plan_repack, repack

    options = Options(trunk=trunk, align=ALIGNMENTS[align.upper()])
    plan = plan_repack(_existing(src), dst.expanduser(), options, delete_source_shards)
    if dry_run:
        click.echo(plan_text(src, plan))
        return
    if delete_source_shards and plan.layout.source.skipped:
        note(
            f"{len(plan.layout.source.skipped)} tensors of {src} are no part of the language "
            "model; those in shards that are deleted are lost."
        )
    if plan.done_bytes:
        note(f"Going on: {size(plan.done_bytes)} of {size(plan.layout.n_bytes)} are there already.")
    from kimi_cpu.kernels import repacking

    started = time.monotonic()
    with progress_bar("repacking", plan.work_bytes) as bar:
        shards = LocalShards(delete_source_shards)
        report = repack(plan, shards, threads, bar.update, repacking)
    took_s = time.monotonic() - started
    click.echo(report_text(report, plan.layout.n_bytes - plan.done_bytes, took_s))
    if delete_source_shards:
        note("Predictions are not compared: the source's shards are deleted.")
    else:
        if report.overall is not None:
            _compare_predictions(src, report.target)
        note(f"To compare every number: kimi-cpu repack --verify {src} {report.target}")


@contextmanager
def progress_bar(what: str, n_bytes: int) -> Iterator[tqdm[None]]:
    """A bar on stderr, if that is a terminal; a Ctrl-C says how to go on."""
    from tqdm import tqdm

    try:
        with tqdm(
            total=n_bytes, unit="B", unit_scale=True, desc=what, disable=None, smoothing=0.1
        ) as bar:
            yield bar
    except KeyboardInterrupt:
        note("Interrupted. What is complete is kept: the same command goes on from there.")
        raise


def plan_text(source: Path | str, plan: Plan) -> str:
    """What --dry-run prints."""
    layout = plan.layout
    experts, rest = sum(layout.expert_files.values()), sum(layout.trunk_files.values())
    shards = layout.source.shards
    enough = "enough" if plan.free_bytes >= plan.needed_bytes else "too little"
    rows = [
        ("from", f"{source}: {_count(len(shards), 'file')}, {size(sum(s.size for s in shards))}"),
        ("to", f"{plan.target}: {size(plan.n_bytes)}"),
        ("experts", f"{size(experts)} in {_count(len(layout.expert_files), 'file')}, INT4 as is"),
        (
            "the rest",
            f"{size(rest)} in {_count(len(layout.trunk_files), 'file')}, {layout.options.trunk}",
        ),
        ("written already", size(plan.done_bytes)),
        ("disk", f"{size(plan.needed_bytes)} needed, {size(plan.free_bytes)} free: {enough}"),
    ]
    return _table(rows)


def report_text(report: Report, written_bytes: int, took_s: float) -> str:
    """What repacking prints at its end."""
    manifest = report.manifest
    n_files = len(manifest.expert_files) + len(manifest.trunk_files)
    speed = f", {size(written_bytes / took_s)}/s" if written_bytes > 0 else ""
    rows = [
        ("packed", f"{report.target}: {size(report.n_bytes)} in {_count(n_files, 'weight file')}"),
        ("took", f"{took_s:.0f} s{speed}"),
        ("experts", "bit for bit as published"),
        *_rounding_rows(manifest.trunk_form, manifest.rounding, report.overall),
    ]
    return _table(rows)


def _verify(folder: Path, source: Path | None, threads: int | None) -> None:
    from kimi_cpu.store.checkpoint import Checkpoint
    from kimi_cpu.store.repack import verify

    checkpoint = Checkpoint.open(folder)
    checkpoint.close()
    with progress_bar("verifying", checkpoint.file_bytes) as bar:
        found = verify(folder, source, threads, bar.update)
    click.echo(_verified_text(found, source))
    if source is not None and found.rounding:
        _compare_predictions(source, folder)


def _verified_text(found: Verified, source: Path | None) -> str:
    rows = [
        ("verified", f"{found.folder}: {size(found.n_bytes)}"),
        ("checksums", f"{found.n_chunks:,} right"),
    ]
    if source is not None:
        rows.append(("experts", f"{found.n_experts:,} equal to {source} bit for bit"))
        rows += _rounding_rows("rounding", found.rounding, found.overall)
    else:
        rows.append(("the source", "not compared; to do so: kimi-cpu repack --verify SRC DST"))
    return _table(rows)


def _compare_predictions(source: Path, folder: Path) -> None:
    """Print how far rounding moved what the model predicts, or say how to get to know it.

    It takes about as long as reading both checkpoints once.
    """
    from tqdm import tqdm

    from kimi_cpu.benchmark.divergence import divergence, fits_in_memory

    try:
        if not fits_in_memory(source, folder):
            note(
                "Predictions are not compared: the checkpoints do not fit into the free memory. "
                f"Where they do: kimi-cpu repack --verify {source} {folder}"
            )
            return
        common.compile_kernels()
        common.watch_weight_files()
        with tqdm(unit=" tokens", desc="predicting", disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = divergence(source, folder, progress)
    except UserError as exc:  # the checkpoint is packed and right, whatever is missing here
        note(f"Predictions are not compared: {exc}")
        return
    value = (
        f"KL {found.mean_kl:.2g} nats on average, {found.max_kl:.2g} at most, same likeliest "
        f"token {found.same_top:.1%} ({found.source})"
    )
    click.echo(_table([("predictions", value)]))


def _rounding_rows(
    what: str, rounding: Mapping[str, Rounding], overall: Rounding | None
) -> Iterator[tuple[str, str]]:
    """One row over all rounded tensors, and one a kind of layer: the worst of it."""
    if overall is None:
        yield "the rest", "as published"
        return
    yield (
        what,
        f"relative L2 error {overall.relative_l2:.2%}, largest {overall.max_abs:.2g}, "
        f"of {_count(len(rounding), 'tensor')}; the worst of a kind:",
    )
    kinds: dict[str, list[Rounding]] = defaultdict(list)
    for name, error in rounding.items():
        kind = name.rpartition(".")[2]
        kinds[f"shared {kind}" if "shared_experts" in name else kind].append(error)
    for kind, errors in kinds.items():
        relative, largest = (max(values) for values in zip(*errors, strict=True))
        yield f"  {kind}", f"{relative:.2%}, largest {largest:.2g}"


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "Name the folder of a checkpoint.")
    return folder


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(20, *(len(name) for name, _ in rows))
    return "\n".join(f"{name:<{width}} {value}" for name, value in rows)
