"""What would make a model faster here: each change computed, the best first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import UserError
from kimi_cpu.planning.machine import Machine
from kimi_cpu.planning.predict import Prediction
from kimi_cpu.planning.shape import Shape, shape_of_config
from kimi_cpu.store.experts.budget import format_size

#: A change that gives less than this is not worth mentioning.
_LEAST_GAIN = 1.05

#: Predicts tokens a second of a shape on a machine with so many bytes.
Rate = Callable[[Shape, Machine, int], Prediction]


@dataclass(frozen=True)
class Advice:
    """A change and what it gives.

    Attributes:
        what: the change in words.
        tps: tokens a second expected with it.
        gain: times as fast as without; None if it does not run without.
    """

    what: str
    tps: float
    gain: float | None


def advise(
    shape: Shape, config: ModelConfig, machine: Machine, memory: int, rate: Rate, most: int = 3
) -> list[Advice]:
    """The changes that help most for this form of the model in `memory` bytes."""
    now = rate(shape, machine, memory)
    found = []
    for what, then in _changes(shape, config, machine, memory, rate):
        if not then.runs:
            continue
        gain = then.expected_tps / now.expected_tps if now.runs else None
        if gain is None or gain >= _LEAST_GAIN:
            found.append(Advice(what, then.expected_tps, gain))
    found.sort(key=lambda advice: -advice.tps)
    return found[:most]


def _changes(
    shape: Shape, config: ModelConfig, machine: Machine, memory: int, rate: Rate
) -> Iterator[tuple[str, Prediction]]:
    """(what to change, what is predicted then)."""
    if shape.form == "published" and shape.expert_kind == "int4":
        yield from _repacked(config, "repack it (int8 trunk)", "int8", machine, memory, rate)
    if shape.trunk != "int4" and config.quantized:
        text = "repack it with --trunk int4 (loses accuracy)"
        yield from _repacked(config, text, "int4", machine, memory, rate)
    for more in _more_memory(shape, memory):
        yield (
            f"memory: {format_size(more)} instead of {format_size(memory)}",
            rate(shape, machine, more),
        )
    usable = int(0.9 * machine.ram_bytes)
    if usable > 1.1 * memory:
        yield (
            f"close other programs: {format_size(usable)} of this machine's memory",
            rate(shape, machine, usable),
        )
    if machine.disk is not None:
        faster = replace(machine, disk=2 * machine.disk)
        yield (
            f"a disk twice as fast ({2 * machine.disk / 1e9:.2g} GB/s)",
            rate(shape, faster, memory),
        )
    faster = replace(
        machine, dram=2 * machine.dram, gemv={k: 2 * v for k, v in machine.gemv.items()}
    )
    yield f"memory twice as fast ({2 * machine.dram / 1e9:.3g} GB/s)", rate(shape, faster, memory)


def _repacked(
    config: ModelConfig, what: str, trunk: str, machine: Machine, memory: int, rate: Rate
) -> Iterator[tuple[str, Prediction]]:
    try:
        shape = shape_of_config(config, "packed", trunk)
    except UserError:
        return
    if {shape.expert_kind, *shape.trunk_kinds} <= machine.gemv.keys():
        yield what, rate(shape, machine, memory)


def _more_memory(shape: Shape, memory: int) -> list[int]:
    """The next larger sizes that are sold, up to what holds everything."""
    sizes = [1 << n for n in range(30, 44)]
    larger = [n for n in sizes if n > 1.2 * memory]
    needed = [n for n in larger if n >= shape.whole_bytes][:1]
    return sorted({*larger[:1], *needed}) if memory < shape.whole_bytes else []
