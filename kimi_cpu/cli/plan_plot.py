"""A drawing of a plan: tokens a second by memory."""

from __future__ import annotations

from pathlib import Path

from kimi_cpu.planning.plan import FormPlan, Plan

_COLOURS = {"packed": "#0072B2", "published": "#D55E00"}
_NAMES = {"packed": "repacked", "published": "as published"}
_G = 1 << 30


def draw(plan: Plan, path: Path) -> None:
    """Draw to an SVG or PNG file; `bench_plot.check` says before whether that is possible."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axis = figure.subplots()
    for form in plan.forms:
        rows = sorted(
            (row for row in [form.here, *form.rows] if row.runs), key=lambda row: row.memory_bytes
        )
        if not rows:
            continue
        name, colour = _label(form), _COLOURS[form.shape.form]
        memory = [row.memory_bytes / _G for row in rows]
        axis.plot(
            memory, [row.expected_tps for row in rows], marker="o", color=colour,
            label=f"{name}: expected",
        )  # fmt: skip
        axis.plot(
            memory, [row.limit_tps for row in rows], linestyle="--", color=colour, alpha=0.7,
            label=f"{name}: limit of disk and memory",
        )  # fmt: skip
        if form.shape.all_experts:
            axis.plot(
                memory, [row.even_tps for row in rows], linestyle=":", color=colour,
                label=f"{name}: with even routing",
            )  # fmt: skip
    axis.axvline(plan.memory_bytes / _G, color="#999999", linewidth=1)
    axis.annotate(
        "this machine now", (plan.memory_bytes / _G, 1), xycoords=("data", "axes fraction"),
        xytext=(4, -4), textcoords="offset points", rotation=90, va="top", fontsize=8,
        color="#666666",
    )  # fmt: skip
    sizes = sorted({row.memory_bytes for form in plan.forms for row in form.rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks([n / _G for n in sizes], [f"{n / _G:,.4g}" for n in sizes])
    axis.minorticks_off()
    axis.set_xlabel("GiB of memory")
    axis.set_ylabel("tokens a second")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.lines[:-1]:
        axis.legend(fontsize=8)
    machine = plan.machine
    disk = "" if machine.disk is None else f", disk {machine.disk / 1e9:.3g} GB/s"
    axis.set_title(
        f"{plan.subject.name} on {machine.cpu}: memory {machine.dram / 1e9:.3g} GB/s{disk}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _label(form: FormPlan) -> str:
    return f"{_NAMES[form.shape.form]}, {form.shape.trunk} trunk"
