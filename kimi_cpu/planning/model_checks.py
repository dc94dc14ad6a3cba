"""What `kimi-cpu doctor PATH` looks at in a model's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kimi_cpu.errors import CheckpointError, UserError
from kimi_cpu.planning.checks import Check, Progress, guarded, locking
from kimi_cpu.store.checkpoint import MANIFEST_NAME, Checkpoint
from kimi_cpu.store.experts.budget import Budget, format_size, make_budget
from kimi_cpu.store.experts.probe import disk_speed

#: Slower than this, a token of Kimi K2 takes most of a minute.
_SLOW_DISK = 0.4e9
#: Experts that take less in all are read at once; measuring would say little.
_SMALL_BYTES = 256 << 20


def model(folder: Path, progress: Progress = lambda text: None) -> list[Check]:
    """The checkpoint, its tokenizer and template, its disk, and whether it fits."""
    progress("reading the checkpoint's headers ...")
    try:
        checkpoint = Checkpoint.open(folder)
    except UserError as error:
        return [Check("checkpoint", "problem", error.message, error.hint)]
    except OSError as exc:
        where = f"{exc.filename or folder}: {exc.strerror or exc}"
        return [Check("checkpoint", "problem", where, "Is it yours to read?")]
    try:
        checks = guarded("checkpoint", lambda: _checkpoint(checkpoint))
        checks += guarded("tokenizer", lambda: _tokenizer(checkpoint))
        if checkpoint.expert_bytes > _SMALL_BYTES:
            progress("measuring the disk ...")
            checks += guarded("disk", lambda: _disk(checkpoint))
        return checks + guarded("fits", lambda: _fits(checkpoint))
    finally:
        checkpoint.close()


def _checkpoint(checkpoint: Checkpoint) -> Check:
    config = checkpoint.config
    packed = (checkpoint.folder / MANIFEST_NAME).exists()
    n_bytes, n_files = checkpoint.file_bytes, checkpoint.n_files
    text = f"{'packed' if packed else 'as published'}, {format_size(n_bytes)} in {n_files} files; "
    text += f"{config.num_hidden_layers} layers"
    if config.moe_layers:
        text += f", {config.n_routed_experts} experts in {len(config.moe_layers)} of them"
    values = {
        "form": "packed" if packed else "published", "file_bytes": n_bytes, "n_files": n_files,
        "experts": len(config.moe_layers) * config.n_routed_experts,
    }  # fmt: skip
    return Check("checkpoint", "ok", f"valid by its headers: {text}", values=values)


def _tokenizer(checkpoint: Checkpoint) -> Check:
    from kimi_cpu.chat.generate import check_tokenizer
    from kimi_cpu.chat.template import ChatTemplate
    from kimi_cpu.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(checkpoint.folder)
        check_tokenizer(tokenizer, checkpoint.config)
        template = ChatTemplate.load(checkpoint.folder)
    except UserError as error:
        change = f"{error.hint} Without it only bench and plan take this folder.".strip()
        return Check("tokenizer", "problem", error.message, change)
    text = f"{tokenizer.n_vocab:,} ids; template {Path(template.name).name}"
    return Check("tokenizer", "ok", text, values={"n_vocab": tokenizer.n_vocab})


def _disk(checkpoint: Checkpoint) -> Check:
    try:
        speed = disk_speed(checkpoint)
    except (OSError, CheckpointError) as exc:
        reason = exc.message if isinstance(exc, UserError) else exc.strerror or str(exc)
        return Check("disk", "problem", f"experts cannot be read: {reason}", "Check the disk.")
    direct = "not possible" if speed.direct is None else f"{speed.direct / 1e9:.2f} GB/s"
    text = f"random experts at {speed.mmap / 1e9:.2f} GB/s mapped, {direct} directly"
    values = {"mmap": speed.mmap, "direct": speed.direct, "best": speed.best}
    if speed.ceiling < _SLOW_DISK:
        change = "What does not fit into memory comes from there: use a local NVMe drive."
        return Check("disk", "warning", text, change, values)
    return Check("disk", "ok", text, values=values)


def _fits(checkpoint: Checkpoint) -> Iterator[Check]:
    budget = make_budget(checkpoint)
    values = {
        "memory_bytes": budget.total_bytes, "floor_bytes": budget.floor_bytes,
        "trunk_bytes": budget.trunk_bytes, "slots": budget.slots(0), "experts": budget.n_experts,
    }  # fmt: skip
    try:
        budget.check()
        if budget.total_bytes < budget.floor_bytes:  # a model without routed experts
            raise UserError(f"{format_size(budget.floor_bytes)} of memory is needed")
    except UserError as error:
        yield Check("fits", "problem", error.message, error.hint, values)
        return
    yield Check("fits", "ok", _shares(budget), values=values)
    if not budget.holds_everything:
        yield locking(budget.trunk_bytes, checkpoint.folder.resolve().name)


def _shares(budget: Budget) -> str:
    memory = format_size(budget.total_bytes)
    if budget.holds_everything:
        return f"all of it fits into the {memory} that may be used"
    slots, all_experts = budget.slots(0), budget.n_experts
    return (
        f"in {memory}: {format_size(budget.trunk_bytes)} that every token needs and {slots:,} of "
        f"{all_experts:,} experts ({slots / all_experts:.1%}); kimi-cpu plan says how fast that is"
    )
