"""`kimi-cpu inspect PATH`: what a model folder holds and what it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kimi_cpu.cli import common
from kimi_cpu.errors import UsageError

if TYPE_CHECKING:
    from kimi_cpu.hardware import Hardware
    from kimi_cpu.store.summary import Summary

_DTYPE_NAMES = {
    "I32": "INT4 (packed in I32)",
    "I64": "int64",
    "BF16": "bf16",
    "F32": "float32",
    "INT4": "INT4 (packed)",
    "INT8": "int8 (packed)",
}


@click.command(
    epilog="Reads headers only, so it is quick whatever the size. With a config.json and no "
    "weights it says what the published weights would need. Without PATH: the nano model."
)
@click.argument("path", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def command(path: str | None, as_json: bool) -> None:
    """Show what a model folder holds and needs."""
    folder = _folder(path)
    from kimi_cpu import hardware
    from kimi_cpu.config import ModelConfig
    from kimi_cpu.store.checkpoint import Checkpoint
    from kimi_cpu.store.summary import summarise

    if next(folder.glob("*.safetensors"), None) is None:
        summary = summarise(ModelConfig.load(folder))
    else:
        checkpoint = Checkpoint.open(folder)
        summary = summarise(checkpoint)
        checkpoint.close()
    machine = hardware.detect()
    if as_json:
        value = {"path": str(folder), **summary.as_dict(), "machine": asdict(machine)}
        click.echo(json.dumps(value, indent=2))
    else:
        click.echo(_text(folder, summary, machine))


def _folder(path: str | None) -> Path:
    if path is None:
        return common.model_folder(None)
    folder = Path(path).expanduser()
    if folder.name == "config.json" and folder.is_file():
        folder = folder.parent
    if folder.is_file():
        raise UsageError(f"{folder} is a file", f"Name its folder: {folder.parent}")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "PATH is a model's folder.")
    return folder


def size(n_bytes: float) -> str:
    """Bytes for people: 1 GB = 10^9 bytes, as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            value = n_bytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def count(n: float) -> str:
    """A number of parameters for people."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f}"


def _text(folder: Path, summary: Summary, machine: Hardware) -> str:
    config = summary.config
    yarn = config["rope_scaling"]
    rope = f"theta {config['rope_theta']:g}"
    if yarn:
        original = yarn["original_max_position_embeddings"]
        rope += f", YaRN factor {yarn['factor']:g} over {original:,}"
    dtypes = sorted(summary.dtype_bytes.items(), key=lambda item: -item[1])
    parts = sorted(summary.trunk_parts.items(), key=lambda item: -item[1])
    stored = f"{summary.n_files} files, {size(summary.disk_bytes)}, {summary.n_tensors:,} tensors"
    if not summary.n_files:
        stored = f"none here; as published {size(summary.disk_bytes)}"
    rows = [
        ("model", f"{folder} ({summary.model_type})"),
        (
            "parameters",
            f"{count(summary.n_parameters)}, {count(summary.n_active_parameters)} for a token",
        ),
        (
            "layers",
            f"{summary.n_layers}, {summary.n_dense_layers} of them dense; "
            f"hidden {config['hidden_size']:,}, vocabulary {config['vocab_size']:,}",
        ),
        (
            "experts",
            f"{config['n_routed_experts']} a layer, {config['num_experts_per_tok']} for a token, "
            f"{config['n_shared_experts']} shared; width {config['moe_intermediate_size']:,}, "
            f"{size(summary.one_expert_bytes)} each",
        ),
        (
            "attention",
            f"MLA, {config['num_attention_heads']} heads, latent {config['kv_lora_rank']} + "
            f"{config['qk_rope_head_dim']}, query rank {config['q_lora_rank'] or 'none'}",
        ),
        ("positions", f"{rope}; up to {summary.max_context:,} tokens"),
        None,
        ("weight files", stored),
        ("stored as", ", ".join(f"{_DTYPE_NAMES.get(n, n)} {size(b)}" for n, b in dtypes)),
        ("experts", size(summary.expert_bytes)),
        ("the rest", f"{size(summary.trunk_bytes)}: {_parts(parts)}"),
        None,
        (
            "each token reads",
            f"{size(summary.token_expert_bytes)} of experts, "
            f"{size(summary.token_trunk_bytes)} of the rest",
        ),
        (
            "context takes",
            f"{size(summary.kv_token_bytes)} a token, "
            f"{size(summary.kv_full_context_bytes)} when full",
        ),
        ("RAM at least", f"{size(summary.ram_minimum_bytes)}; the experts then come from disk"),
        ("RAM at best", f"{size(summary.ram_all_bytes)}; nothing is read twice"),
        (
            "this machine has",
            f"{size(machine.ram_bytes)} of RAM, {size(machine.available_ram_bytes)} of it free; "
            f"{machine.threads} cores, {machine.cpu}",
        ),
    ]
    return "\n".join("" if row is None else f"{row[0]:<17} {row[1]}" for row in rows)


def _parts(parts: list[tuple[str, int]]) -> str:
    shown = [f"{name.replace('_', ' ')} {size(n)}" for name, n in parts if n]
    return ", ".join(shown)
