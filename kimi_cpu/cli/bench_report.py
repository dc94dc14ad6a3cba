"""Rows of a benchmark as a Markdown table, CSV or JSON, with llama-bench's field names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from kimi_cpu.benchmark.runner import Row
from kimi_cpu.benchmark.traffic import PARTS
from kimi_cpu.cli.inspect import count, size

FORMATS = ("md", "csv", "json", "jsonl")


def record(row: Row, common: dict[str, Any]) -> dict[str, Any]:
    """One JSON object: `common` (see `Bench.describe`) and all that was measured.

    Rates are tokens a second, sizes bytes, `*_ns` nanoseconds; `profile_ms` is milliseconds a
    token by part, or null.
    """
    samples_ns = [round(sample.seconds * 1e9) for sample in row.samples]
    mean_ns = sum(samples_ns) / len(samples_ns)
    variance = sum((n - mean_ns) ** 2 for n in samples_ns) / max(1, len(samples_ns) - 1)
    profile = row.profile and {part: seconds * 1e3 for part, seconds in row.profile.items()}
    return common | {
        "precision": row.precision,
        "cache": "cold" if row.cold else "warm",
        "seed": row.seed,
        "n_threads": row.threads,
        "n_prompt": row.test.n_prompt,
        "n_gen": row.test.n_gen,
        "n_depth": row.test.n_depth,
        "test": row.test.name,
        "test_time": row.started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(mean_ns),
        "stddev_ns": round(variance**0.5),
        "avg_ts": row.avg_ts,
        "stddev_ts": row.stddev_ts,
        "samples_ns": samples_ns,
        "samples_ts": row.samples_ts,
        "bytes_per_token": row.traffic.total_bytes,
        "trunk_bytes_per_token": row.traffic.trunk_bytes,
        "expert_bytes_per_token": row.traffic.expert_bytes,
        "cache_bytes_per_token": row.traffic.cache_bytes,
        "part_bytes_per_token": row.traffic.part_bytes,
        "experts_per_pass": row.traffic.experts_per_pass,
        "disk_bytes_per_token": row.disk_bytes_per_token,
        "expert_hit_rate": row.experts.hit_rate,
        "lookahead_recall": row.experts.recall,
        "memory": row.memory,
        "io": row.io,
        "ceiling_bytes_per_s": row.ceiling_bytes_per_s,
        "ceiling_samples_bytes_per_s": row.ceilings,
        "ceiling_ts": row.ceiling_ts,
        "ceiling_fraction": row.ceiling_fraction,
        "profile_ms": profile,
        "disk_wait_ms": row.disk_wait_s and row.disk_wait_s * 1e3,
    }


#: Fields that are objects by part; columns of their own in CSV.
_BY_PART = ("part_bytes_per_token", "profile_ms")


def as_json(records: Sequence[dict[str, Any]]) -> str:
    """A JSON list of the records."""
    return json.dumps(list(records), indent=2)


def as_jsonl(value: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(value)


def as_csv(value: dict[str, Any], header: bool) -> str:
    """One line of CSV, its header before it if asked for; lists are JSON, null is empty."""
    flat = {key: v for key, v in value.items() if key not in _BY_PART}
    for part in PARTS:
        name = part.replace(" ", "_")
        flat[f"{name}_bytes_per_token"] = value["part_bytes_per_token"][part]
        flat[f"{name}_ms"] = (value["profile_ms"] or {}).get(part)
    cells = {key: json.dumps(v) if isinstance(v, list) else v for key, v in flat.items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(cells), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow(cells)
    return text.getvalue().rstrip("\n")


#: Column -> (width, whether numbers stand in it).
_COLUMNS = {
    "model": (24, False), "size": (9, True), "params": (9, True), "threads": (7, True),
    "test": (15, False), "t/s": (17, True), "MB/token": (9, True), "disk MB/token": (13, True),
    "ceiling t/s": (11, True), "share": (6, True),
}  # fmt: skip


def md_header() -> str:
    """The table's first two lines."""
    rule = [f"{'-' * (width - 1)}{':' if right else '-'}" for width, right in _COLUMNS.values()]
    return f"{_line(list(_COLUMNS))}\n| {' | '.join(rule)} |"


def md_row(value: dict[str, Any], model: str) -> str:
    """A record as the table's line; `model` is how the model is called."""
    disk = value["disk_bytes_per_token"]
    return _line([
        model,
        size(value["model_size"]),
        count(value["model_n_params"]),
        str(value["n_threads"]),
        value["test"],
        f"{_rate(value['avg_ts'])} ± {_rate(value['stddev_ts'])}",
        f"{value['bytes_per_token'] / 1e6:.4g}",
        "?" if disk is None else f"{disk / 1e6:.3g}",
        _rate(value["ceiling_ts"]),
        f"{value['ceiling_fraction']:.0%}",
    ])  # fmt: skip


def _rate(value: float) -> str:
    return f"{value:.2f}"


def _line(cells: list[str]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, (width, right) in zip(cells, _COLUMNS.values(), strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def md_footer(records: Sequence[dict[str, Any]]) -> str:
    """What the table's columns mean here, and the split by part if there is one."""
    first = records[0]
    rates = [r["ceiling_bytes_per_s"] / 1e9 for r in records]
    low, high = f"{min(rates):.1f}", f"{max(rates):.1f}"
    n_runs = len(first["samples_ts"])
    lines = [
        "",
        f"kimi-cpu {first['build_version']}, {first['cpu_info']}, {first['kernels']}, "
        f"{first['precision']}, {first['cache']} page cache, "
        f"{n_runs} run{'s' if n_runs > 1 else ''} of each",
        f"memory reads at {low if low == high else f'{low}-{high}'} GB/s "
        "(best plain reader, between the runs)",
        "MB/token: weights and latents that a token makes the memory deliver; a prompt's tokens "
        f"share each pass of up to {first['n_batch']}, where a chosen expert counts once",
        "share: of the ceiling, the rate if nothing but these reads took time",
    ]
    bounded = [r for r in records if r["memory"] is not None]
    if bounded:
        shares = ", ".join(f"{r['test']} {r['expert_hit_rate']:.1%}" for r in bounded)
        lines.append(
            f"experts in memory when they were needed ({size(bounded[0]['memory'])} allowed, "
            f"{bounded[0]['io']} reads): {shares}"
        )
    split = [r for r in records if r["profile_ms"]]
    if split:
        lines += [
            "",
            *_md_profile(split),
            "",
            "measured in a run of its own, with a clock around every kernel; it is slower than the "
            "runs above, which the engine records and plays without returning to Python",
        ]
    return "\n".join(lines)


def _md_profile(records: Sequence[dict[str, Any]]) -> list[str]:
    """A table of milliseconds a token: tests by parts."""
    parts = [part for part in PARTS if any(r["profile_ms"][part] > 0 for r in records)]
    waits = any(r["disk_wait_ms"] for r in records)
    rows = [["ms/token", "threads", *parts, "all", *(["of it for the disk"] if waits else [])]]
    for r in records:
        split = r["profile_ms"]
        total = sum(split.values())
        row = [r["test"], str(r["n_threads"])]
        row += [f"{split[part]:.3g} ({split[part] / total:.0%})" for part in parts]
        row.append(f"{total:.3g}")
        if waits:
            row.append(f"{r['disk_wait_ms']:.3g}")
        rows.append(row)
        if not r["n_prompt"]:  # else arithmetic decides, not memory
            sizes = r["part_bytes_per_token"]
            rates = [f"{sizes[part] / split[part] / 1e6:.3g} GB/s" for part in parts]
            rate = f"{r['bytes_per_token'] / total / 1e6:.3g} GB/s"
            rows.append(["", "", *rates, rate, *([""] if waits else [])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    rows.insert(1, rule)
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(f"| {' | '.join(cells)} |")
    return lines
