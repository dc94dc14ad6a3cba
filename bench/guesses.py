"""How often a layer's experts can be guessed before they are chosen, by the rank of the guess.

    python -m bench.guesses [-m FOLDER] [--tokens 256]

As the engine looks ahead: the next layer's router is asked about the residual behind this layer's
attention, before this layer's experts have been added to it; behind a dense layer it is asked just
before its own attention. Its choices come best first; for each rank the share of tokens is shown in
which that expert is then chosen. A trained model is needed: by default the embedded one, which
reads a text of sums and stories like those it was trained on.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kimi_cpu.engine import Engine
from kimi_cpu.errors import UserError
from kimi_cpu.kernels import reference
from kimi_cpu.kernels.common import I32, ExpertTable
from kimi_cpu.model import Model
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.opening import open_experts
from kimi_cpu.store.experts.residency import LayerExperts
from kimi_cpu.tokenizer import Tokenizer

_NANO = Path(__file__).parents[1] / "weights" / "nano"
_TEXT = """Tom has 3 apples and Anna gives him 14 more. How many apples does Tom have now?
What is 17 + 25? The sum is 42. What is 8 times 7? The capital of France is Paris.
Once there was a small fox who lived near the river. Here is a list: red, green, blue.
Sort these numbers: 9, 2, 14, 7. Write the word house backwards.
"""


class WatchedKernels(ModuleType):
    """Plain kernels that remember what each layer was expected to choose, and what it chose."""

    def __init__(self) -> None:
        super().__init__(reference.__name__)
        self.guessed: dict[int, list[list[int]]] = defaultdict(list)
        self.chosen: dict[int, list[set[int]]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def anticipate(self, experts: ExpertTable, ids: I32) -> None:
        assert isinstance(experts.source, LayerExperts)
        self.guessed[experts.source.layer].append(ids[0].tolist())

    def request(self, experts: ExpertTable, ids: I32) -> None:
        assert isinstance(experts.source, LayerExperts)
        self.chosen[experts.source.layer].append(set(ids[0].tolist()))
        reference.request(experts, ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", dest="folder", type=Path, default=_NANO)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    checkpoint = Checkpoint.open(options.folder)
    experts = open_experts(checkpoint)
    experts.looks_ahead[0] = 1  # also where all experts fit into memory
    kernels = WatchedKernels()
    ids = Tokenizer.load(options.folder).encode_text(_TEXT)
    ids = (ids * (1 + options.tokens // len(ids)))[: options.tokens]
    with Engine(checkpoint, Model(checkpoint, experts, kernels, "fast", 1)) as engine:
        session = engine.session()
        for token in ids:
            session.step(token)
    print(f"share of right guesses by rank, {len(ids)} tokens")
    for layer, guesses in sorted(kernels.guessed.items()):
        right = [
            [expert in choice for expert in guess]
            for guess, choice in zip(guesses, kernels.chosen[layer], strict=True)
        ]
        by_rank = " ".join(f"{share:.2f}" for share in np.mean(right, axis=0))
        print(f"layer {layer:2d}: {by_rank}   all {np.mean(right):.2f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
