"""Muon for matrices and AdamW for the rest, on the parameters that one process owns."""

from __future__ import annotations

import torch
from torch import Tensor

MUON_SCALE = 0.2
_ADAM_NAMES = ("embed", "head", "router", "norm")


def uses_muon(name: str) -> bool:
    """Embeddings, head, routers and norms are AdamW's; every other matrix is Muon's."""
    return not any(part in name.split(".")[-1] for part in _ADAM_NAMES)


def orthogonalize(g: Tensor) -> Tensor:
    """Newton-Schulz iteration on a batch of matrices [B, r, c], in bfloat16."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        b = -4.7750 * a + 2.0315 * (a @ a)
        x = 3.4445 * x + b @ x
    return (x.transpose(1, 2) if tall else x).float()


class Optimizer:
    """State and update rule for ``owned`` parameters, name to tensor."""

    def __init__(self, owned: dict[str, Tensor], weight_decay: float = 0.05) -> None:
        self.owned, self.weight_decay = owned, weight_decay
        self.first = {n: torch.zeros_like(p) for n, p in owned.items()}
        self.second = {n: torch.zeros_like(p) for n, p in owned.items() if not uses_muon(n)}
        self.steps = 0

    def state(self) -> dict[str, object]:
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def load(self, state: dict) -> None:  # type: ignore[type-arg]
        for mine, theirs in ((self.first, state["first"]), (self.second, state["second"])):
            for name, value in mine.items():
                value.copy_(theirs[name])
        self.steps = state["steps"]

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], lr: float) -> None:
        self.steps += 1
        for name, p in self.owned.items():
            g, m = grads[name], self.first[name]
            if uses_muon(name):
                m.mul_(0.95).add_(g)
                update = g + 0.95 * m
                shape = update.shape
                if update.dim() == 2:
                    update = update.unsqueeze(0)
                if "gate_up" in name:  # two matrices side by side
                    halves = [orthogonalize(h) for h in update.chunk(2, 2)]
                    rows, columns = halves[0].shape[1:]
                    update = torch.cat(halves, 2)
                else:
                    update = orthogonalize(update)
                    rows, columns = update.shape[1:]
                p.mul_(1 - lr * self.weight_decay)
                p.add_(update.view(shape), alpha=-lr * MUON_SCALE * max(rows, columns) ** 0.5)
            else:
                v = self.second[name]
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.05)
                mean = m / (1 - 0.9**self.steps)
                root = (v / (1 - 0.95**self.steps)).sqrt_().add_(1e-8)
                p.addcdiv_(mean, root, value=-lr)
