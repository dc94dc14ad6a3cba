"""The text that the ranks are trained on: the same dialogues, as text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from .bpe import train_ranks
from .render import DEFAULT_SYSTEM
from .scenes import draw_scene, draw_turn

RANKS, WHOLE_WORDS = 1024, 560
_ROLES = ("user", "assistant", "system", "tool", "tool_declare")


def texts(seed: int, dialogues: int = 4000) -> Iterator[str]:
    """Pieces of dialogue text, tool declarations and system messages now and then."""
    rng = random.Random(f"ranks/{seed}")
    for index in range(dialogues):
        kind = rng.choice(("plain", "builtin", "builtin", "other"))
        scene = draw_scene(rng, kind)
        for _ in range(3):
            turn = draw_turn(rng, scene, kind)
            yield turn.user
            for step in turn.steps:
                yield from (step.think, step.content)
                for (name, arguments), result in zip(step.calls, step.results, strict=True):
                    yield from (arguments, result, f"functions.{name}:0")
                    yield f"## Return of functions.{name}:0\n"
        if index % 10 == 0:
            yield json.dumps(list(scene.tools), separators=(",", ":"))
            yield scene.system or DEFAULT_SYSTEM
            yield from _ROLES


def make_ranks(seed: int) -> list[bytes]:
    """Tokens in rank order for ``seed``."""
    return train_ranks(texts(seed), RANKS, WHOLE_WORDS)
