"""The engine against transformers' DeepseekV3ForCausalLM, recorded and live (-m oracle)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.engine import Backend, Engine
from kimi_cpu.quant import F32
from tests.oracle import (
    CASES,
    NEW_TOKENS,
    PROMPT_TOKENS,
    VECTORS,
    Case,
    live_oracle,
    oracle_greedy,
    oracle_logits,
    weights_digest,
)

TOLERANCE = 1e-4  # relative L2, as the project promises

#: Ways to feed a prompt of PROMPT_TOKENS: all at once, one by one, and uneven chunks. Chunks above
#: and below the border between absorbed and expanded attention occur in both orders.
CHUNKINGS = [[PROMPT_TOKENS], [1] * PROMPT_TOKENS, [1, 7, 36], [40, 3, 1], [13, 31]]


def relative_l2(ours: F32, theirs: F32) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(VECTORS / "oracle.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case.name: case.write(tmp_path_factory.mktemp(case.name)) for case in CASES}


def check_logits(engine: Engine, prompt: list[int], expected: F32) -> None:
    """`score`, and `sync` in every chunking, give the expected logits after every chunk."""
    assert relative_l2(engine.score(prompt), expected) < TOLERANCE
    for chunks in CHUNKINGS:
        session = engine.session()
        done = 0
        for size in chunks:
            done += size
            assert relative_l2(session.sync(prompt[:done]), expected[done - 1]) < TOLERANCE


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    session = engine.session()
    logits = session.sync(prompt)
    for _ in range(count):
        logits = session.step(int(logits.argmax()))
    return list(session.tokens[len(prompt) :])


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 8


@pytest.mark.parametrize("backend", ["reference", "simd"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_recorded(
    case: Case, backend: Backend, folders: dict[str, Path], recorded: dict[str, np.ndarray]
) -> None:
    folder = folders[case.name]
    provenance = json.loads((VECTORS / "oracle.json").read_text())
    assert weights_digest(folder) == provenance["weights_sha256"][case.name], (
        "tests.tiny makes other weights than those the vectors were recorded with: "
        "run `python -m tools.dump_reference`"
    )
    with Engine.load(folder, precision="exact", threads=2, backend=backend) as engine:
        prompt = case.prompt(engine.config.vocab_size)
        check_logits(engine, prompt, recorded[f"{case.name}.logits"])
        expected = recorded[f"{case.name}.greedy"].tolist()
        assert greedy(engine, prompt, NEW_TOKENS) == expected


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_live(case: Case, folders: dict[str, Path], recorded: dict[str, np.ndarray]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = folders[case.name]
    oracle = live_oracle(folder)
    with Engine.load(folder, precision="exact") as engine:
        prompt = case.prompt(engine.config.vocab_size)
        expected = oracle_logits(oracle, prompt)
        assert relative_l2(recorded[f"{case.name}.logits"], expected) < 1e-5
        # Another prompt than the recorded one, too.
        check_logits(engine, prompt[::-1], oracle_logits(oracle, prompt[::-1]))
        assert greedy(engine, prompt, NEW_TOKENS) == oracle_greedy(oracle, prompt, NEW_TOKENS)


def test_the_comparison_can_fail(folders: dict[str, Path], recorded: dict[str, np.ndarray]) -> None:
    """A small error anywhere in the graph exceeds the tolerance."""
    case = CASES[0]
    with Engine.load(folders[case.name], precision="exact", backend="reference") as engine:
        engine._model._inv_freq = engine._model._inv_freq * 1.001
        prompt = case.prompt(engine.config.vocab_size)
        assert relative_l2(engine.score(prompt), recorded[f"{case.name}.logits"]) > TOLERANCE
