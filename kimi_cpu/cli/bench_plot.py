"""A drawing of benchmark records: rates by context depth, and where a token's time goes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_cpu.benchmark.traffic import PARTS
from kimi_cpu.errors import UsageError

SUFFIXES = (".svg", ".png")

#: One colour a part, told apart by people who see few colours (Okabe and Ito).
_COLOURS = dict(
    zip(
        PARTS,
        ("#0072B2", "#F0E442", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#999999"),
        strict=True,
    )
)
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def check(path: Path) -> None:
    """Raises UsageError, before anything is measured, if `path` could not be drawn to."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: not .svg or .png", "Use a name like bench.svg.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such folder", "Create it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", "pip install 'kimi-cpu[plot]'"
        )


def draw(records: Sequence[dict[str, Any]], model: str, path: Path) -> None:
    """Draw records (see `bench_report.record`) to an SVG or PNG file.

    Up to three panels, whichever there is something for: decoding and prompts in tokens a second
    by context depth, decoding with its ceiling; and milliseconds a token by part.
    """
    from matplotlib.figure import Figure

    decode = [r for r in records if not r["n_prompt"]]
    prompt = [r for r in records if not r["n_gen"]]
    split = [r for r in decode or records if r["profile_ms"]]
    panels = [rows for rows in (decode, prompt, split) if rows]
    widths = [4.6] * len(panels)
    if split:
        widths[-1] = max(4.6, 0.7 * len(split))
    figure = Figure(figsize=(1 + sum(widths), 4.6), layout="constrained")
    axes = iter(figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0])
    if decode:
        _rates(next(axes), decode, "Decoding", ceiling=True)
    if prompt:
        _rates(next(axes), prompt, "Prompt", ceiling=False)
    if split:
        _split(next(axes), split)
    first = records[0]
    figure.suptitle(
        f"{model}: {first['cpu_info']}, {first['precision']}, {first['cache']}", fontsize=11
    )
    figure.savefig(path, dpi=150)


def _label(record: dict[str, Any]) -> str:
    threads = record["n_threads"]
    return f"{record['test'].partition(' @')[0]}, {threads} thread{'s' if threads > 1 else ''}"


def _rates(axis: Any, records: Sequence[dict[str, Any]], title: str, ceiling: bool) -> None:
    """Tokens a second over context depth, a line a test and number of threads."""
    for i, label in enumerate(dict.fromkeys(map(_label, records))):
        rows = sorted((r for r in records if _label(r) == label), key=lambda r: r["n_depth"])
        depths = [r["n_depth"] for r in rows]
        colour = _LINES[i % len(_LINES)]
        axis.errorbar(
            depths, [r["avg_ts"] for r in rows], yerr=[r["stddev_ts"] for r in rows],
            marker="o", capsize=3, color=colour, label=label,
        )  # fmt: skip
        if ceiling:
            axis.plot(
                depths, [r["ceiling_ts"] for r in rows], marker="_", markersize=12,
                linestyle="--", color=colour, alpha=0.6, label=f"{label}: memory's limit",
            )  # fmt: skip
    axis.set_title(title)
    axis.set_xlabel("tokens of context before")
    axis.set_ylabel("tokens a second")
    axis.set_ylim(bottom=0)
    depths = sorted({r["n_depth"] for r in records})
    axis.set_xticks(depths, [f"{depth:,}" for depth in depths])
    axis.margins(x=0.15)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)


def _split(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    """Milliseconds a token by part, a stacked bar a record."""
    names = [f"{r['test'].replace(' @ ', chr(10))}\n{r['n_threads']} t" for r in records]
    bottom = [0.0] * len(records)
    for part in PARTS:
        heights = [max(0.0, r["profile_ms"][part]) for r in records]
        if any(heights):
            axis.bar(names, heights, bottom=bottom, width=0.6, color=_COLOURS[part], label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.set_title("Time by part")
    axis.set_ylabel("milliseconds a token")
    axis.set_ylim(top=1.35 * max(bottom))  # room for the legend
    axis.margins(x=0.15)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=8, ncols=2, loc="upper center")
