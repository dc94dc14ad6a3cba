"""Scenes (declared tools, system message) and the choice of families inside them."""

from __future__ import annotations

import random
from typing import Any

from .dialogues import BUILTIN_MIX, OTHER_MIX, PLAIN_MIX, Family, Scene, Turn, draw
from .words import SYSTEMS


def _tool(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = {"properties": properties}
    if properties:
        parameters["required"] = sorted(properties)
    parameters["type"] = "object"
    return {
        "function": {"description": description, "name": name, "parameters": parameters},
        "type": "function",
    }


# What `kimi-cpu chat` declares, keys sorted as the published tokenizer code sorts them.
BUILTIN_TOOLS = (
    _tool("calculator", "Evaluate an arithmetic expression.", {"expression": {"type": "string"}}),
    _tool("clock", "Tell the current date and time.", {}),
)
_PLAIN = Scene()
_BUILTIN = Scene(BUILTIN_TOOLS, None, frozenset({"calculator", "clock"}))
_CHOICES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "get_weather": (
        ("Get the weather of a city.", "Current weather for a city.", "Get weather.",
         "Get the current weather in a given city."),
        "city", "string",
    ),
    "get_price": (
        ("Get the price of an item.", "Look up the price of an item.", "Price of an item."),
        "item", "string",
    ),
    "set_timer": (
        ("Set a timer.", "Start a timer for some minutes.", "Set a timer in minutes."),
        "minutes", "integer",
    ),
    "roll_dice": (
        ("Roll a die.", "Roll a die with some sides.", "Throw dice."), "sides", "integer",
    ),
    "send_email": (("Send an email.", "Send an email to a person."), "to", "string"),
    "search_web": (("Search the web.", "Web search for a query."), "query", "string"),
    "read_file": (("Read a file.", "Read a text file."), "path", "string"),
}  # fmt: skip


def other_scene(rng: random.Random) -> Scene:
    """A random selection and order of tools with slightly varied descriptions."""
    chosen = rng.sample(sorted(_CHOICES), rng.randint(1, 3))
    if not any(name in ("get_weather", "get_price", "set_timer", "roll_dice") for name in chosen):
        chosen.append(rng.choice(("get_weather", "get_price", "set_timer", "roll_dice")))
    tools = []
    for name in chosen:
        descriptions, argument, kind = _CHOICES[name]
        schema: dict[str, Any] = {"type": kind}
        if rng.random() < 0.2:
            schema = {"description": f"The {argument}.", "type": kind}
        tools.append(_tool(name, rng.choice(descriptions), {argument: schema}))
    for tool in BUILTIN_TOOLS:
        if rng.random() < 0.4:
            tools.append(tool)
    rng.shuffle(tools)
    return Scene(tuple(tools), None, frozenset(t["function"]["name"] for t in tools))


def draw_scene(rng: random.Random, kind: str) -> Scene:
    """A scene of kind ``plain``, ``builtin`` or ``other``; a few have a system message."""
    scene = {"plain": lambda: _PLAIN, "builtin": lambda: _BUILTIN}.get(
        kind, lambda: other_scene(rng)
    )()
    if rng.random() < 0.06:
        scene = Scene(scene.tools, rng.choice(SYSTEMS), scene.names)
    return scene


def draw_turn(rng: random.Random, scene: Scene, kind: str) -> Turn:
    """A training turn for ``scene`` after the mixture of its kind."""
    mix: tuple[tuple[Family, float], ...] = {"plain": PLAIN_MIX, "builtin": BUILTIN_MIX}.get(
        kind, OTHER_MIX
    )
    family = rng.choices([f for f, _ in mix], [share for _, share in mix])[0]
    return draw(rng, family, scene)
