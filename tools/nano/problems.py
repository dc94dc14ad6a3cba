"""Held-out problems by family, for measuring a model; needs no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import dialogues as d
from .scenes import draw_scene

# name of the table's line: the family and the scene it is asked in
FAMILIES: dict[str, tuple[d.Family, str]] = {
    "small sums": (d.small_sum, "plain"),
    "small sums, calculator declared": (d.small_sum, "builtin"),
    "calculator": (d.calculation, "builtin"),
    "sums too large without calculator": (d.calculation, "plain"),
    "facts": (d.fact, "plain"),
    "facts, tools declared": (d.fact, "builtin"),
    "clock": (d.clock, "builtin"),
    "comparison": (d.comparison, "plain"),
    "weather tool": (d.weather_of_one, "get_weather"),
    "weather tool, two calls": (d.weather_of_two, "get_weather"),
    "price tool": (d.price, "get_price"),
    "timer tool": (d.timer, "set_timer"),
    "dice tool": (d.dice, "roll_dice"),
    "small talk": (d.small_talk, "plain"),
    "out of scope": (d.anything_else, "plain"),
    "out of scope, tools declared": (d.anything_else, "builtin"),
}


@dataclass
class Problem:
    """One held-out question in its context; ``warm_up`` is an earlier turn of the same chat."""

    scene: d.Scene
    turn: d.Turn
    warm_up: d.Turn | None = None


def _scene(rng: random.Random, kind: str) -> d.Scene:
    while True:
        scene = draw_scene(rng, kind if kind in ("plain", "builtin") else "other")
        if kind in ("plain", "builtin") or kind in scene.names:
            return scene


def problems(name: str, count: int, seed: int, second_turn: bool = False) -> list[Problem]:
    """``count`` held-out problems of a family, a function of its arguments."""
    rng = random.Random(f"eval/{name}/{seed}/{second_turn}")
    family, kind = FAMILIES[name]
    out = []
    for _ in range(count):
        scene = _scene(rng, kind)
        turn = d.draw(rng, family, scene, held_out=True)
        warm_up = None
        if second_turn:
            first = rng.choice((d.small_sum, d.fact, d.small_talk, d.calculation))
            warm_up = d.draw(rng, first, scene, held_out=True)
        out.append(Problem(scene, turn, warm_up))
    return out
