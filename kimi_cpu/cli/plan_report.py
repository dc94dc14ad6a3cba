"""A plan for people: the verdict, what was measured, a table, what would help."""

from __future__ import annotations

import textwrap

from kimi_cpu.cli.inspect import size
from kimi_cpu.planning.plan import FormPlan, Plan
from kimi_cpu.planning.predict import Prediction
from kimi_cpu.planning.shape import Shape
from kimi_cpu.store.experts.budget import format_size

#: Fits a terminal of 80 columns.
WIDTH = 79
#: Of tok/s against what `kimi-cpu bench` then measured: bench/LOG.md, 2026-11-28.
_ERROR_SEEN = "Where both were measured, tok/s was 25 % too low to 17 % too high."
#: Fewer bytes per token than this may come from a cache instead of memory.
_FITS_CACHE_BYTES = 64 << 20
#: Fastest pass over memory against the slowest: more than an idle machine shows.
_UNSTEADY = 1.4
_BOUNDS = {"disk": "d", "memory": "m"}


def text(plan: Plan) -> str:
    """Everything, in lines of at most WIDTH."""
    lines = [*_wrapped(verdict(plan)), ""]
    for label, words in _facts(plan):
        lines += _wrapped(words, label)
    lines += ["", *_table(plan), ""]
    lines += _wrapped(
        f"here: share of the experts in memory; hit: of a token's experts those found there; "
        f"limit: what the disk (d) or memory (m) allows; prompt: {plan.prompt_tokens:,} tokens, "
        f"which are the context of tok/s; *: this machine now. {_ERROR_SEEN}"
    )
    advice = _advice(plan)
    if advice:
        lines += ["", "What would help most:", *advice]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """One sentence."""
    best = plan.best
    here, name = best.here, plan.subject.name
    memory = format_size(plan.memory_bytes)
    others = [form for form in plan.forms if form is not best]
    if not here.runs:
        needs = " or ".join(
            f"{format_size(f.here.floor_bytes)} {_form(f.shape)}" for f in (best, *others)
        )
        return f"{name} does not run here: it needs at least {needs}, and {memory} may be used."
    how = f" {_form(best.shape)}" if others else ""
    where = "all of it in memory" if here.share >= 1 else f"in {memory}"
    said = (
        f"{name} runs here{how} at about {_rate(here.expected_tps)} tokens/s, {where}; "
        f"{'the disk' if here.bound == 'disk' else 'memory bandwidth'} is the limit."
    )
    for form in others:
        if form.here.runs:
            said += f" {_form(form.shape).capitalize()}: {_rate(form.here.expected_tps)}."
        else:
            least = format_size(form.here.floor_bytes)
            said += f" {_form(form.shape).capitalize()} it would need {least}."
    return said


def _form(shape: Shape) -> str:
    return "repacked" if shape.form == "packed" else "as published"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """(label, words) of the machine, the model and the assumption."""
    machine = plan.machine
    low, high = (rate / 1e9 for rate in machine.dram_range)
    measured = f"memory {machine.dram / 1e9:.3g} GB/s ({low:.3g} to {high:.3g})"
    speed = machine.disk_speed
    if machine.disk is not None:
        measured += f"; disk {machine.disk / 1e9:.2f} GB/s"
        if speed is not None and speed.direct is not None:
            measured += (
                f" (mapped {speed.mmap / 1e9:.2f}, direct {speed.direct / 1e9:.2f}, "
                f"{size(speed.expert_bytes)} at random)"
            )
        elif speed is None:
            measured += " (given)"
    shape = plan.forms[0].shape
    trunks = [f"{size(f.shape.trunk_bytes)} {_form(f.shape)}" for f in plan.forms]
    model = f"trunk, which stays in memory: {', '.join(trunks)}"
    if shape.n_moe_layers:
        model += (
            f"; {shape.all_experts:,} experts of {size(shape.expert_bytes)}, "
            f"{shape.n_moe_layers * shape.top_k} a token ({size(shape.token_expert_bytes)})"
        )
    facts = [
        (
            "machine",
            f"{machine.cpu}, {machine.variant}, {machine.threads} "
            f"thread{'s' if machine.threads > 1 else ''}; memory "
            f"{format_size(machine.ram_bytes)}, free {format_size(machine.available_bytes)}, "
            f"to be used {format_size(plan.memory_bytes)}",
        ),
        ("measured", measured),
        ("model", model),
    ]
    if shape.n_moe_layers:
        facts.append(("assumed", plan.routing.text))
        even = _even(plan)
        if even:
            facts.append((" ", even))
    if high > _UNSTEADY * low:
        facts.append((
            "mind", f"memory's speed varied {high / low:.1f}-fold while it was measured: something "
            "else uses this machine, and all rates are as uncertain; try again when it is idle",
        ))  # fmt: skip
    if shape.trunk_bytes + shape.token_expert_bytes < _FITS_CACHE_BYTES:
        facts.append(
            ("mind", "so small a model stays in the CPU's caches: it will be faster than this")
        )
    return facts


def _even(plan: Plan) -> str:
    """How much hangs on the assumption."""
    here = plan.best.here
    if not here.runs or here.hit_rate >= 1 or plan.routing.kind == "given":
        return ""
    if _rate(here.even_tps) == _rate(here.expected_tps):
        return "even routing would give the same rate here"
    return (
        f"with even routing {_rate(here.even_tps)} tokens/s here instead of "
        f"{_rate(here.expected_tps)}"
    )


def _table(plan: Plan) -> list[str]:
    """A line an amount of memory, a group of columns a form."""
    heads = ("here", "hit", "tok/s", "limit", "prompt")
    titles = "".join(
        f"  {f' {_form(f.shape)}, {f.shape.trunk} trunk '.center(_GROUP - 2, '-')}"
        for f in plan.forms
    )
    columns = "".join(
        "".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True))
        for _ in plan.forms
    )
    lines = ["         " + titles, f"{'memory':>9}{columns}"]
    rows = [(row.memory_bytes, i) for i, row in enumerate(plan.forms[0].rows)]
    rows.append((plan.memory_bytes, -1))
    for memory, i in sorted(rows):
        mark = "*" if i < 0 else " "
        cells = "".join(_cells(form.here if i < 0 else form.rows[i]) for form in plan.forms)
        lines.append(f"{mark}{format_size(memory):>8}{cells}".rstrip())
    return lines


_WIDTHS = (7, 6, 7, 8, 7)
_GROUP = sum(_WIDTHS)


def _cells(row: Prediction) -> str:
    if not row.runs:
        return f"  needs {format_size(row.floor_bytes)}".ljust(_GROUP)
    cells = (
        _percent(row.share), _percent(row.hit_rate), _rate(row.expected_tps),
        f"{_rate(row.limit_tps)} {_BOUNDS[row.bound]}", _time(row.prompt_s),
    )  # fmt: skip
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _advice(plan: Plan) -> list[str]:
    form: FormPlan = plan.best
    return [
        line
        for advice in form.advice
        for line in _wrapped(
            f"{advice.what}: {_rate(advice.tps)} tokens/s"
            + ("" if advice.gain is None else f", {advice.gain:.2g} x"),
            "-",
        )
    ]


def _percent(part: float) -> str:
    if 0.1 <= part < 0.995 or part in (0, 1):
        return f"{part:.0%}"
    return f"{100 * part:.1f}%"


def _rate(tps: float) -> str:
    """Tokens a second in at most five characters."""
    if tps >= 99.5:
        return f"{tps:.0f}"
    return f"{tps:.1f}" if tps >= 9.95 else f"{tps:.2f}"


def _time(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _wrapped(words: str, label: str = "") -> list[str]:
    indent = f"{label} " if label == "-" else f"{label:<10}" if label else ""
    under = " " * len(indent)
    return textwrap.wrap(
        words, WIDTH, initial_indent=indent, subsequent_indent=under, break_on_hyphens=False
    )
