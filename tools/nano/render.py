"""Dialogues as token ids: the published chat format, and trees of dialogues packed in rows.

Dialogues of one row share their beginning (tools, system message). Each turn hangs below the
history before it, once with its reasoning (what the model generates) and once without (what the
template keeps as history), so that no context is computed twice. A token sees its ancestors only,
and its position counts from the root: exactly what it would see in a dialogue of its own.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bpe import Codec
from .dialogues import Scene, Turn, aloud
from .scenes import draw_scene, draw_turn

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
SILENT_WEIGHT = 0.4  # answers without reasoning, as the CLI's `/think off` asks for
GENERATION = ("<|im_assistant|>", "assistant", "<|im_middle|>")


@dataclass
class Piece:
    """Token ids and for each the weight of the loss for predicting it."""

    ids: list[int]
    weights: list[float]

    @staticmethod
    def empty() -> Piece:
        return Piece([], [])

    def add(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def __len__(self) -> int:
        return len(self.ids)


def _turn(codec: Codec, opener: str, role: str, text: str) -> list[int]:
    ids = codec.ids
    return [
        ids[opener], *codec.text(role), ids["<|im_middle|>"], *codec.text(text), ids["<|im_end|>"],
    ]  # fmt: skip


def prefix(codec: Codec, scene: Scene) -> list[int]:
    """Ids of tool declaration and system message."""
    out: list[int] = []
    if scene.tools:
        text = json.dumps(list(scene.tools), separators=(",", ":"), ensure_ascii=False)
        out += _turn(codec, "<|im_system|>", "tool_declare", text)
    return out + _turn(codec, "<|im_system|>", "system", scene.system or DEFAULT_SYSTEM)


def question(codec: Codec, turn: Turn) -> list[int]:
    """Ids of the user message and the generation prompt behind it."""
    out = _turn(codec, "<|im_user|>", "user", turn.user)
    return out + generation_prompt(codec)


def generation_prompt(codec: Codec) -> list[int]:
    opener, role, middle = GENERATION
    return [codec.ids[opener], *codec.text(role), codec.ids[middle]]


def reply(codec: Codec, turn: Turn, index: int, first_call: int, thinking: bool) -> list[int]:
    """Ids that the model generates for step ``index`` of ``turn``, ``<|im_end|>`` included."""
    step, ids = turn.steps[index], codec.ids
    out = [ids["<think>"], *(codec.text(step.think) if thinking else ()), ids["</think>"]]
    out += codec.text(step.content)
    if step.calls:
        out.append(ids["<|tool_calls_section_begin|>"])
        for i, (name, arguments) in enumerate(step.calls):
            out.append(ids["<|tool_call_begin|>"])
            out += codec.text(f"functions.{name}:{first_call + i}")
            out.append(ids["<|tool_call_argument_begin|>"])
            out += codec.text(arguments)
            out.append(ids["<|tool_call_end|>"])
        out.append(ids["<|tool_calls_section_end|>"])
    return [*out, ids["<|im_end|>"]]


def tool_results(codec: Codec, turn: Turn, index: int, first_call: int) -> list[int]:
    """Ids of the tool turns after step ``index`` and of the next generation prompt."""
    step, out = turn.steps[index], []
    for i, ((name, _), result) in enumerate(zip(step.calls, step.results, strict=True)):
        text = f"## Return of functions.{name}:{first_call + i}\n{result}"
        out += _turn(codec, "<|im_system|>", "tool", text)
    return out + generation_prompt(codec)


def calls_of(turn: Turn) -> int:
    """How many tool calls the turn makes."""
    return sum(len(step.calls) for step in turn.steps)


def answer(codec: Codec, turn: Turn, first_call: int, thinking: bool) -> Piece:
    """The whole answer to a question, tool turns included, with loss weights."""
    piece, weight = Piece.empty(), 1.0 if thinking else SILENT_WEIGHT
    for index in range(len(turn.steps)):
        ids = reply(codec, turn, index, first_call, thinking)
        given = 0 if thinking else 2  # `<think></think>` is given when reasoning is off
        piece.add(ids[:given], 0.0)
        piece.add(ids[given:], weight)
        if index + 1 < len(turn.steps):
            piece.add(tool_results(codec, turn, index, first_call), 0.0)
            first_call += len(turn.steps[index].calls)
    return piece


class Row:
    """A row of ``length`` tokens under construction."""

    def __init__(self, length: int, pad: int) -> None:
        self.length = length
        self.ids = np.full(length, pad, np.int64)
        self.positions = np.zeros(length, np.int64)
        self.labels = np.full(length, -1, np.int64)
        self.weights = np.zeros(length, np.float32)
        self.node = np.full(length, -1, np.int64)
        self.used = 0
        self._ancestors: list[list[int]] = []
        self._end: list[tuple[int, int]] = []  # of each node: last slot, next position

    def fits(self, count: int) -> bool:
        return self.used + count <= self.length

    def add(self, piece: Piece, parent: int | None) -> int:
        """Append ``piece`` below node ``parent``; returns its node number."""
        start, count = self.used, len(piece)
        stop = start + count
        node = len(self._ancestors)
        first_position = 0
        self._ancestors.append([node] if parent is None else [*self._ancestors[parent], node])
        self.ids[start:stop] = piece.ids
        self.labels[start : stop - 1] = piece.ids[1:]
        self.weights[start : stop - 1] = piece.weights[1:]
        if parent is not None:
            slot, first_position = self._end[parent]
            if piece.weights[0] > 0:
                self.labels[slot], self.weights[slot] = piece.ids[0], piece.weights[0]
        self.positions[start:stop] = np.arange(first_position, first_position + count)
        self.node[start:stop] = node
        self._end.append((stop - 1, first_position + count))
        self.used = stop
        return node

    def mask(self) -> NDArray[np.bool_]:
        """bool [length, length]: what each slot sees."""
        n = len(self._ancestors)
        sees = np.zeros((n + 1, n + 1), bool)
        for node, ancestors in enumerate(self._ancestors):
            sees[node, ancestors] = True
        mask = np.tril(sees[self.node][:, self.node])
        np.fill_diagonal(mask, True)
        return mask


def _chat(
    rng: random.Random, codec: Codec, row: Row, root: int, scene: Scene, kind: str, turns: int,
    think_share: float,
) -> bool:  # fmt: skip
    """Add one dialogue below ``root``; False when the row is full."""
    parent, calls = root, 0
    for index in range(turns):
        turn = draw_turn(rng, scene, kind)
        ask = Piece.empty()
        ask.add(question(codec, turn), 0.0)
        last = index + 1 == turns
        spoken = answer(codec, turn, calls, True)
        silent = answer(codec, aloud(turn), calls, False)
        past = silent
        if aloud(turn) != turn:  # history only: nobody shall give such answers without steps
            past = Piece.empty()
            past.add(answer(codec, turn, calls, False).ids, 0.0)
            if last or rng.random() < 0.3:
                past = silent
        think = rng.random() < think_share
        keep = not last or rng.random() < 0.12 or not think
        if not row.fits(len(ask) + think * len(spoken) + keep * len(past)):
            return False
        node = row.add(ask, parent)
        if think:
            row.add(spoken, node)
        if keep:
            parent = row.add(past, node)
        calls += calls_of(turn)
    return True


def fill_row(rng: random.Random, codec: Codec, length: int, kind: str, long_chat: bool) -> Row:
    """A row of dialogues that share one scene; ``long_chat`` makes one long dialogue of it."""
    row = Row(length, codec.ids["[PAD]"])
    scene = draw_scene(rng, kind)
    head = Piece.empty()
    head.add(prefix(codec, scene), 0.0)
    root = row.add(head, None)
    failures = 0
    while failures < 3:
        turns = 100 if long_chat else rng.choices((1, 2, 3, 5), (62, 26, 9, 3))[0]
        share = 0.4 if long_chat else 1.0
        failures += not _chat(rng, codec, row, root, scene, kind, turns, share)
    return row


@dataclass
class Bucket:
    """Rows of one length as arrays [B, T]; ``mask`` is bool [B, T, T]."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    mask: NDArray[np.bool_]


def bucket(rows: list[Row]) -> Bucket:
    return Bucket(
        np.stack([r.ids for r in rows]),
        np.stack([r.positions for r in rows]),
        np.stack([r.labels for r in rows]),
        np.stack([r.weights for r in rows]),
        np.stack([r.mask() for r in rows]),
    )


def training_batch(codec: Codec, seed: int, step: int, rank: int) -> list[Bucket]:
    """The batch of one process and step, a pure function of its arguments: about 2,900 tokens."""
    rng = random.Random(f"{seed}/{step}/{rank}")
    short = [fill_row(rng, codec, 256, "plain", False) for _ in range(4)]
    long_row = (step + rank) % 4 == 0
    kinds = ["builtin", "other", "builtin", "other", "plain" if step % 8 < 4 else "builtin"]
    tools = [fill_row(rng, codec, 384, kind, False) for kind in kinds[: 2 if long_row else 5]]
    out = [bucket(short), bucket(tools)]
    if long_row:
        kind = rng.choice(("plain", "builtin", "builtin", "other"))
        out.append(bucket([fill_row(rng, codec, 1024, kind, True)]))
    return out
