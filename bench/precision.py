"""How far `precision="fast"` is from `"exact"` on the nano model.

    python -m bench.precision [--dialogues 60]

Scores held-out dialogues of all task families with both. Prints the mean KL divergence of fast from
exact in nats and how often both have the same most likely token: over all positions, and over
those that the model writes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from kimi_cpu.engine import Engine
from tools.nano.bpe import Codec, read_ranks
from tools.nano.problems import FAMILIES, problems
from tools.nano.render import answer, prefix, question

NANO = Path(__file__).resolve().parent.parent / "weights" / "nano"


@dataclass(frozen=True)
class Agreement:
    """Over `tokens` positions: mean KL(exact || fast) in nats, and the share of equal arg max."""

    tokens: int
    mean_kl: float
    top1: float


def dialogues(count: int, seed: int = 1) -> list[tuple[list[int], npt.NDArray[np.bool_]]]:
    """Token ids of held-out dialogues, and which positions predict a token of the model's own."""
    codec = Codec(read_ranks(NANO / "tiktoken.model"))
    out = []
    for i in range(count):
        family = list(FAMILIES)[i % len(FAMILIES)]
        problem = problems(family, 1, seed + i)[0]
        head = prefix(codec, problem.scene) + question(codec, problem.turn)
        reply = answer(codec, problem.turn, 0, thinking=True)
        own = np.array([False] * (len(head) - 1) + [w > 0 for w in reply.weights] + [False])
        out.append((head + reply.ids, own))
    return out


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def measure(count: int) -> dict[str, Agreement]:
    """Agreement over "all" positions and over the model's "own"."""
    with (
        Engine.load(NANO, precision="exact") as exact,
        Engine.load(NANO, precision="fast") as fast,
    ):
        kl, same, own = [], [], []
        for ids, is_own in dialogues(count):
            p, q = log_softmax(exact.score(ids)), log_softmax(fast.score(ids))
            kl.append((np.exp(p) * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            own.append(is_own)
    kl_all, same_all, own_all = (np.concatenate(parts) for parts in (kl, same, own))
    return {
        name: Agreement(int(mask.sum()), float(kl_all[mask].mean()), float(same_all[mask].mean()))
        for name, mask in (("all", np.ones_like(own_all)), ("own", own_all))
    }


@click.command(help=__doc__.partition("\n")[0])
@click.option("--dialogues", "count", default=60, show_default=True)
def main(count: int) -> None:
    for name, a in measure(count).items():
        print(f"{name}: {a.tokens} positions, KL {a.mean_kl:.2e} nats, top-1 {a.top1:.2%}")


if __name__ == "__main__":
    main()
