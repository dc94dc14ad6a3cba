"""Greedy accuracy of a torch model on held-out problems, decoded in batches, by family."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .bpe import Codec
from .dialogues import aloud
from .problems import Problem
from .render import answer, calls_of, prefix, question, reply, tool_results
from .torch_model import Nano


@dataclass
class Outcome:
    """What became of a problem: outputs of all steps, exact final answer, exact whole reply."""

    problem: Problem
    outputs: list[list[int]] = field(default_factory=list)
    answer_ok: bool = False
    reply_ok: bool = True


@torch.no_grad()
def generate(model: Nano, prompts: list[list[int]], stop: int, limit: int) -> list[list[int]]:
    """Greedy continuations, each up to and including ``stop``."""
    longest = max(map(len, prompts))
    pads = torch.tensor([longest - len(p) for p in prompts])
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    positions = (torch.arange(longest).unsqueeze(0) - pads.unsqueeze(1)).clamp_min(0)
    cache: list[object] = [None] * len(model.layers)
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for count in range(limit):
        last = model.step(ids, positions, cache, pads)[:, -1].argmax(-1)
        for i, token in enumerate(last.tolist()):
            if not done[i]:
                out[i].append(token)
                done[i] = token == stop
        if all(done):
            break
        ids = last.unsqueeze(1)
        positions = (longest + count - pads).unsqueeze(1)
    return out


def context(codec: Codec, problem: Problem) -> tuple[list[int], int]:
    """Prompt ids up to the generation prompt of the asked turn, and the index of its first call."""
    ids, first = prefix(codec, problem.scene), 0
    if problem.warm_up is not None:
        ids += question(codec, problem.warm_up)
        ids += answer(codec, problem.warm_up, 0, False).ids
        first = calls_of(problem.warm_up)
    return ids + question(codec, problem.turn), first


def run(model: Nano, codec: Codec, todo: list[Problem], thinking: bool = True) -> list[Outcome]:
    """Solve the problems greedily; a wrong call ends a problem, a right one gets its result."""
    end, close = codec.ids["<|im_end|>"], codec.ids["</think>"]
    outcomes = [Outcome(p) for p in todo]
    turns = [p.turn if thinking else aloud(p.turn) for p in todo]
    prompts = [context(codec, p) for p in todo]
    open_ = list(range(len(todo)))
    index = 0
    while open_:
        given = [] if thinking else [codec.ids["<think>"], close]
        outs = generate(model, [prompts[i][0] + given for i in open_], end, 160)
        still = []
        for i, generated in zip(open_, outs, strict=True):
            ids, first = prompts[i]
            outcome, turn = outcomes[i], turns[i]
            out = given + generated
            outcome.outputs.append(out)
            want = reply(codec, turn, index, first, thinking)
            outcome.reply_ok &= out == want
            tail = out[out.index(close) :] if close in out else None
            right = tail == want[want.index(close) :]
            if index + 1 == len(turn.steps):
                outcome.answer_ok = right
            elif right:
                more = out + tool_results(codec, turn, index, first)
                prompts[i] = (ids + more, first + len(turn.steps[index].calls))
                still.append(i)
            else:
                outcome.reply_ok = False
        open_, index = still, index + 1
    return outcomes


def show(codec: Codec, outcome: Outcome) -> str:
    """One line: the question and what the model made of it."""
    made = " || ".join(codec.decode(o) for o in outcome.outputs)
    return f"{outcome.problem.turn.user!r} -> {made}"
