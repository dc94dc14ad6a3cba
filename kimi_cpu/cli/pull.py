"""`kimi-cpu pull REPO DST`: a checkpoint from a hub, as published or repacked on the way."""

from __future__ import annotations

import time
from pathlib import Path

import click

from kimi_cpu.cli.inspect import size
from kimi_cpu.cli.repack import ALIGNMENTS, plan_text, progress_bar, report_text
from kimi_cpu.cli.terminal import note
from kimi_cpu.errors import UsageError


@click.command(
    epilog="REPO is OWNER/NAME, e.g. moonshotai/Kimi-K2-Thinking; DST a new folder. It can be "
    "interrupted in any way, and the same command goes on from there. With --repack each file is "
    "deleted once what was made of it is verified, so that the disk holds the packed checkpoint "
    "and a few files of the published one. Needs huggingface_hub: pip install 'kimi-cpu[hub]'. "
    "HF_TOKEN is the token for a private or gated repository, HF_ENDPOINT another hub."
)
@click.argument("repo")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--revision", metavar="REV", help="Branch, tag or commit; default: the newest.")
@click.option("--repack", "repacking", is_flag=True, help="Convert it as `kimi-cpu repack` does.")
@click.option("--trunk", type=click.Choice(["int8", "bf16", "int4"]), help="As `repack` has it.")
@click.option(
    "--align", type=click.Choice(list(ALIGNMENTS), case_sensitive=False), help="Likewise."
)
@click.option("--dry-run", is_flag=True, help="Fetch small files only, show sizes and free space.")
def command(
    repo: str,
    dst: Path,
    revision: str | None,
    repacking: bool,
    trunk: str | None,
    align: str | None,
    dry_run: bool,
) -> None:
    """Download a checkpoint from a hub."""
    dst = dst.expanduser()
    if (trunk or align) and not repacking:
        raise UsageError("--trunk and --align are for --repack", "Add it, or leave them out.")
    if repacking:
        _pull_and_repack(repo, dst, revision, trunk or "int8", align or "4K", dry_run)
    else:
        _pull(repo, dst, revision, dry_run)


def _pull(repo: str, dst: Path, revision: str | None, dry_run: bool) -> None:
    from kimi_cpu.store.hub import plan_pull

    plan = plan_pull(repo, dst, revision)
    total = sum(plan.hub.sizes[name] for name in plan.files)
    if dry_run:
        enough = "enough" if plan.free_bytes >= plan.needed_bytes else "too little"
        click.echo(
            f"{repo}: {len(plan.files)} files, {size(total)}\n"
            f"{dst}: {size(plan.needed_bytes)} needed, {size(plan.free_bytes)} free: {enough}"
        )
        return
    number = 0

    def on_file(name: str) -> None:
        nonlocal number
        number += 1
        note(f"file {number} of {len(plan.files)}: {name}, {size(plan.hub.sizes[name])}")

    try:
        folder = plan.run(on_file)
    except KeyboardInterrupt:
        note("Interrupted. What is complete is kept: the same command goes on from there.")
        raise
    click.echo(f"{folder}: {size(total)}, commit {plan.hub.commit}")


def _pull_and_repack(
    repo: str, dst: Path, revision: str | None, trunk: str, align: str, dry_run: bool
) -> None:
    from kimi_cpu.store.hub import plan_pull_and_repack
    from kimi_cpu.store.repack import Options, repack

    options = Options(trunk=trunk, align=ALIGNMENTS[align.upper()])
    plan, shards = plan_pull_and_repack(repo, dst, options, revision)
    if dry_run:
        click.echo(plan_text(repo, plan))
        return
    if plan.done_bytes:
        note(f"Going on: {size(plan.done_bytes)} of {size(plan.layout.n_bytes)} are there already.")
    from kimi_cpu.kernels import repacking

    started = time.monotonic()
    with progress_bar("repacking", plan.work_bytes) as bar:
        report = repack(plan, shards, on_bytes=bar.update, kernels=repacking)
    written_bytes = plan.layout.n_bytes - plan.done_bytes
    click.echo(report_text(report, written_bytes, time.monotonic() - started))
