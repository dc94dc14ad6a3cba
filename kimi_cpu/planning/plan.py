"""A whole plan: a model's forms, in several amounts of memory, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import UsageError
from kimi_cpu.planning.advice import Advice, advise
from kimi_cpu.planning.machine import (
    GEMM_TOKENS,
    Machine,
    Meter,
    probe_checkpoint,
    probe_folder,
)
from kimi_cpu.planning.predict import Prediction, predict
from kimi_cpu.planning.routing import Routing
from kimi_cpu.planning.shape import Kind, Shape, shape_of_checkpoint, shape_of_config
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.budget import default_memory
from kimi_cpu.store.experts.probe import DiskSpeed

#: Told what is being measured.
Progress = Callable[[str], None]

#: Turns of the meter at a time: before the disk is measured, after it, and in the end.
_TURNS = 2
#: Most rows of a table that nobody asked for.
_MOST_SIZES = 8


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        name: for people.
        config: of the model.
        checkpoint: if its weights are here.
        folder: where the disk is measured.
        shapes: its forms: as it is, and repacked if that is another.
    """

    name: str
    config: ModelConfig
    checkpoint: Checkpoint | None
    folder: Path
    shapes: list[Shape]


@dataclass(frozen=True)
class FormPlan:
    """One form of the model.

    Attributes:
        shape: the form.
        here: with the memory that may be used now.
        rows: in the amounts asked for.
        advice: what would help most, the best first.
    """

    shape: Shape
    here: Prediction
    rows: list[Prediction]
    advice: list[Advice]


@dataclass(frozen=True)
class Plan:
    """Everything that was found out.

    Attributes:
        subject, machine, routing: what was planned, on what, and the assumption.
        memory_bytes: what may be used now: available, less a tenth or 1 GB.
        prompt_tokens: of the prompt, which then is the context of decoding.
        forms: one for each of the subject's shapes.
    """

    subject: Subject
    machine: Machine
    routing: Routing
    memory_bytes: int
    prompt_tokens: int
    forms: list[FormPlan]

    @property
    def best(self) -> FormPlan:
        """The form that is expected to be fastest here; of two that do not run, the smaller."""
        return max(self.forms, key=lambda f: (f.here.expected_tps, -f.here.floor_bytes))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: sizes in bytes, rates a second."""
        machine = asdict(self.machine)
        machine["gemm"] = {
            kind: dict(zip(map(str, GEMM_TOKENS), rates, strict=True))
            for kind, rates in self.machine.gemm.items()
        }
        return {
            "model": self.subject.name,
            "folder": None if self.subject.checkpoint is None else str(self.subject.folder),
            "machine": machine,
            "memory_bytes": self.memory_bytes,
            "prompt_tokens": self.prompt_tokens,
            "assumption": {"kind": self.routing.kind, "text": self.routing.text},
            "forms": [
                {
                    "shape": asdict(form.shape)
                    | {
                        "trunk_bytes": form.shape.trunk_bytes,
                        "whole_bytes": form.shape.whole_bytes,
                    },
                    "here": form.here.as_dict(),
                    "rows": [row.as_dict() for row in form.rows],
                    "advice": [asdict(advice) for advice in form.advice],
                }
                for form in self.forms
            ],
        }


def subject_of(
    name: str, folder: Path, config: ModelConfig, checkpoint: Checkpoint | None
) -> Subject:
    """A model to plan; without its checkpoint, as published."""
    if checkpoint is None:
        own = shape_of_config(config, "published")
    else:
        own = shape_of_checkpoint(checkpoint)
    shapes = [own]
    if own.form == "published" and own.expert_kind == "int4" and own.n_moe_layers:
        shapes.append(shape_of_config(config, "packed"))
    return Subject(name, config, checkpoint, folder, shapes)


def make_plan(
    subject: Subject,
    routing: Routing,
    sizes: Sequence[int] = (),
    *,
    prompt_tokens: int,
    disk: float | None = None,
    progress: Progress = lambda text: None,
) -> Plan:
    """Measure, and predict.

    Args:
        sizes: amounts of memory in bytes; by default powers of two from what runs at all to what
            holds everything.
        prompt_tokens: length of the prompt to be timed.
        disk: bytes a second, instead of measuring.

    Raises UsageError (the disk cannot be measured).
    """
    memory = default_memory()  # before measuring takes some
    chosen = list(sizes) or default_sizes(subject.shapes)
    kinds: set[Kind] = {"float"}
    for shape in subject.shapes:
        kinds |= {*shape.trunk_kinds, shape.expert_kind}
    progress("measuring memory ...")
    meter = Meter(sorted(kinds))
    _turns(meter, progress)
    speed = None
    if disk is None and subject.shapes[0].n_moe_layers:
        progress("measuring the disk ...")
        speed = _probe(subject)
        _turns(meter, progress)
        progress("measuring the disk ...")
        # A disk has bad seconds, but no good ones: the better of two is what it can do.
        speed = max(speed, _probe(subject), key=lambda s: s.ceiling)
        disk = speed.ceiling
    else:
        _turns(meter, progress)
    progress("replaying choices of experts ...")
    for shape in subject.shapes:  # remembered by `routing`
        for n_bytes in (memory, *chosen):
            if (slots := shape.budget(n_bytes).slots(prompt_tokens * shape.latent_bytes)) > 0:
                routing.hit_rate(slots)
    _turns(meter, progress)
    machine = replace(meter.machine(), disk=disk, disk_speed=speed)

    def rate(shape: Shape, on: Machine, n_bytes: int) -> Prediction:
        return predict(shape, on, routing, n_bytes, prompt_tokens, prompt_tokens)

    forms = [
        FormPlan(
            shape=shape,
            here=rate(shape, machine, memory),
            rows=[rate(shape, machine, n) for n in chosen],
            advice=advise(shape, subject.config, machine, memory, rate),
        )
        for shape in subject.shapes
    ]
    return Plan(subject, machine, routing, memory, prompt_tokens, forms)


def _turns(meter: Meter, progress: Progress) -> None:
    progress("measuring memory and arithmetic ...")
    for _ in range(_TURNS):
        meter.turn()


def _probe(subject: Subject) -> DiskSpeed:
    """How fast the subject's disk is. Raises UsageError."""
    if subject.checkpoint is None:
        expert_bytes = subject.shapes[0].expert_bytes
        return probe_folder(subject.folder, subject.config, expert_bytes)
    try:
        return probe_checkpoint(subject.checkpoint)
    except OSError as exc:
        raise UsageError(
            f"{subject.folder}: the disk cannot be measured ({exc.strerror or exc})",
            "Say its speed: --disk 3.5 (GB/s)",
        ) from None


def default_sizes(shapes: Sequence[Shape]) -> list[int]:
    """Powers of two from the first in which a form runs to the first that holds them all."""
    lowest = min(shape.budget(0).floor_bytes for shape in shapes)
    highest = max(shape.whole_bytes for shape in shapes)
    sizes = [1 << n for n in range(28, 60)]
    first = next(i for i, n in enumerate(sizes) if n >= lowest)
    last = next(i for i, n in enumerate(sizes) if n >= highest)
    return sizes[first : last + 1][-_MOST_SIZES:]
