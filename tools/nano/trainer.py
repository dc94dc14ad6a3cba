"""The training loop: processes of one thread each, with parameters and gradients in shared memory.

The state directory holds ``ranks`` (the tokenizer), ``log.jsonl`` and the newest checkpoint; a run
continues from there with the same stream of data, which is a function of seed and step.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from .bpe import Codec, read_ranks
from .optim import Optimizer
from .render import Bucket, training_batch
from .torch_model import Nano, NanoConfig

WORLD = 2
WARM_UP = 40
EMA_EVERY, EMA_KEEP = 5, 0.98
INT4_FROM = 0.85
BIAS_STEP = 2e-3


@dataclass(frozen=True)
class Budget:
    """What a training run may take; the learning rate falls to zero at its end."""

    minutes: float
    lr: float
    seed: int
    hold: float = 0.5

    def rate(self, step: int, progress: float) -> float:
        warm = min(1.0, (step + 1) / WARM_UP)
        fall = 1.0 if progress < self.hold else max(0.0, (1 - progress) / (1 - self.hold))
        return self.lr * warm * fall


class Flat:
    """All parameters, gradients and router biases in shared tensors."""

    def __init__(self, model: Nano) -> None:
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        size = sum(p.numel() for p in model.parameters())
        moe = [layer for layer in model.layers if not layer.dense]
        experts = model.c.n_routed_experts
        self.values = torch.cat([p.detach().flatten() for p in model.parameters()]).share_memory_()
        self.grads = [torch.zeros(size).share_memory_() for _ in range(WORLD)]
        self.bias = torch.zeros(len(moe), experts).share_memory_()
        self.load = torch.zeros(WORLD, len(moe), experts).share_memory_()
        self.control = torch.zeros(4 + WORLD, dtype=torch.float64).share_memory_()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        out, start = {}, 0
        for name, shape in self.shapes.items():
            count = torch.Size(shape).numel()
            out[name] = flat[start : start + count].view(shape)
            start += count
        return out

    def attach(self, model: Nano, rank: int) -> None:
        values, grads = self.views(self.values), self.views(self.grads[rank])
        for name, p in model.named_parameters():
            p.data, p.grad = values[name], grads[name]
        for index, layer in enumerate(layer for layer in model.layers if not layer.dense):
            layer.bias, layer.load = self.bias[index], self.load[rank, index]


def owned_names(shapes: dict[str, tuple[int, ...]], rank: int) -> list[str]:
    """The parameters that process ``rank`` updates, balanced by size."""
    loads, owner = [0] * WORLD, {}
    for name in sorted(shapes, key=lambda n: (-torch.Size(shapes[n]).numel(), n)):
        least = loads.index(min(loads))
        owner[name] = least
        loads[least] += torch.Size(shapes[name]).numel()
    return [name for name in shapes if owner[name] == rank]


def tensors(b: Bucket) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v) for k, v in vars(b).items()}


def latest(state: Path) -> Path | None:
    """Folder of the newest complete checkpoint."""
    pointer = state / "latest"
    return state / pointer.read_text().strip() if pointer.exists() else None


def load_model(state: Path, ema: bool) -> tuple[Nano, dict[str, Any], Codec]:
    """The newest checkpoint's model (moving average or raw weights), its record and tokenizer."""
    folder = latest(state)
    if folder is None:
        raise SystemExit(f"no checkpoint in {state}: train first")
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = Nano(NanoConfig(**saved["config"]))
    flat = Flat(model)
    flat.values.copy_(saved["ema" if ema else "values"])
    flat.bias.copy_(saved["bias"])
    flat.attach(model, 0)
    for p in model.parameters():
        p.requires_grad_(False)
    return model, saved["record"], Codec(read_ranks(state / "ranks"))


def _save(
    state: Path, rank: int, step: int, opt: Optimizer, payload: dict[str, Any] | None
) -> None:
    folder = state / f"step-{step:06d}"
    folder.mkdir(exist_ok=True)
    torch.save(opt.state(), folder / f"optimizer{rank}.pt")
    if payload is not None:
        torch.save(payload, folder / "model.pt")


def _publish(state: Path, step: int) -> None:
    name = f"step-{step:06d}"
    (state / "latest.tmp").write_text(name)
    (state / "latest.tmp").replace(state / "latest")
    for old in state.glob("step-*"):
        if old.name < name:
            shutil.rmtree(old, ignore_errors=True)


def _work(rank: int, flat: Flat, barrier: Any, state: Path, config: NanoConfig, budget: Budget,
          record: dict[str, Any], ema: Tensor) -> None:  # fmt: skip
    torch.set_num_threads(1)
    codec = Codec(read_ranks(state / "ranks"))
    model = Nano(config)
    flat.attach(model, rank)
    mine = owned_names(flat.shapes, rank)
    values, grads = flat.views(flat.values), [flat.views(g) for g in flat.grads]
    opt = Optimizer({n: values[n] for n in mine})
    folder = latest(state)
    if folder is not None:
        opt.load(torch.load(folder / f"optimizer{rank}.pt", weights_only=True))
    step, tokens, before = record["step"], record["tokens"], record["seconds"]
    stop = [False]
    if rank == 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.__setitem__(0, True))
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = saved = time.monotonic()
    losses: list[float] = []
    log = (state / "log.jsonl").open("a") if rank == 0 else None
    while True:
        if rank == 0:
            seconds = before + time.monotonic() - start
            progress = seconds / (budget.minutes * 60)
            done = stop[0] or progress >= 1
            flat.control[0], flat.control[1] = progress, float(done)
            flat.control[2] = float(done or time.monotonic() - saved > 180)
        flat.grads[rank].zero_()
        batch = [tensors(b) for b in training_batch(codec, budget.seed, step, rank)]
        loss = model.loss(batch)
        loss.backward()
        flat.control[4 + rank] = loss.item()
        barrier.wait()
        progress, done, save = (float(flat.control[i]) for i in range(3))
        model.fake_int4 = progress >= INT4_FROM
        rate = budget.rate(step, progress)
        opt.step({n: (grads[0][n] + grads[1][n]) / WORLD for n in mine}, rate)
        step += 1
        tokens += WORLD * sum(b["ids"].numel() for b in batch)
        if rank == 0:
            load = flat.load.sum(0)
            pull = BIAS_STEP * min(1.0, 2 * rate / budget.lr)
            flat.bias += pull * torch.sign(load.mean(1, keepdim=True) - load)
            flat.bias -= flat.bias.mean(1, keepdim=True)
            losses.append(float(flat.control[4:].mean()))
            if step % 20 == 0 and log is not None:
                line = {
                    "step": step, "tokens": tokens, "seconds": round(seconds, 1),
                    "loss": round(sum(losses) / len(losses), 4), "lr": round(rate, 6),
                    "load": round(float((load.amax(1) / load.mean(1)).max()), 2),
                }  # fmt: skip
                losses.clear()
                log.write(json.dumps(line) + "\n")
                log.flush()
        barrier.wait()
        flat.load[rank].zero_()
        if rank == 0 and step % EMA_EVERY == 0:
            ema.lerp_(flat.values, 1 - min(EMA_KEEP, step / (step + 50)))
        if save:
            payload = None
            if rank == 0:
                new = record | {"step": step, "tokens": tokens, "seconds": seconds}
                payload = {
                    "values": flat.values, "ema": ema, "bias": flat.bias, "record": new,
                    "config": config.to_dict(),
                }  # fmt: skip
            _save(state, rank, step, opt, payload)
            saved = time.monotonic()
            barrier.wait()
            if rank == 0:
                _publish(state, step)
        if done:
            return


def train(state: Path, config: NanoConfig, budget: Budget) -> None:
    """Train, or go on training, until the budget's minutes are used up or a signal comes."""
    torch.manual_seed(budget.seed)
    flat = Flat(Nano(config))
    ema = flat.values.clone()
    record: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "seed": budget.seed}
    folder = latest(state)
    if folder is not None:
        saved = torch.load(folder / "model.pt", weights_only=True)
        if saved["config"] != config.to_dict():
            raise SystemExit(f"{folder} has another shape: use a fresh --state folder")
        flat.values.copy_(saved["values"])
        flat.bias.copy_(saved["bias"])
        ema, record = saved["ema"], saved["record"]
    context = mp.get_context("spawn")
    barrier = context.Barrier(WORLD)
    others = [
        context.Process(
            target=_work, args=(rank, flat, barrier, state, config, budget, record, ema)
        )
        for rank in range(1, WORLD)
    ]
    for process in others:
        process.start()
    try:
        _work(0, flat, barrier, state, config, budget, record, ema)
    finally:
        barrier.abort() if any(p.exitcode not in (None, 0) for p in others) else None
        for process in others:
            process.join(60)
