"""Real models: latents from disk, or from another session, are the computed ones, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.engine import Engine
from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.prefixes import PrefixCache
from tests.tiny import tiny_checkpoint

#: Serves a prompt and prints a digest of the logits of some steps after it.
SERVE = """
import hashlib, sys
from pathlib import Path
from kimi_cpu.engine import Engine
from kimi_cpu.prefixes import PrefixCache
from tests.prefixes.test_restart import prompt
model, folder, precision = sys.argv[1:]
with Engine.load(model, precision=precision, threads=2) as engine:
    cache = PrefixCache(engine, 1 << 30, folder=Path(folder), folder_bytes=1 << 30)
    session = cache.take(prompt(engine))
    known = len(session)
    for end in (300, 600, 700):  # as a server's slices
        if end > known:
            session.sync(prompt(engine)[:end])
    digest = hashlib.sha256()
    for token in (1, 2, 3, 4):
        digest.update(session.step(token).tobytes())
    print(known, digest.hexdigest())
    session.rewind(4)
    cache.give_back(session)
    cache.close()
"""


def prompt(engine: Engine) -> list[int]:
    return np.random.default_rng(0).integers(0, engine.config.vocab_size, 700).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder, 5)
    return folder


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_logits_after_a_restart(folder: Path, tmp_path: Path, precision: str) -> None:
    command = [sys.executable, "-c", SERVE, str(folder), str(tmp_path), precision]
    answers = [
        subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
        ).stdout.split()
        for _ in range(2)
    ]
    assert [known for known, _ in answers] == ["0", "700"]
    assert answers[0][1] == answers[1][1]


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("common", [20, BLOCK_TOKENS, 540])
def test_a_shared_beginning_changes_nothing(
    folder: Path, tmp_path: Path, precision: str, common: int
) -> None:
    """A session that begins with another's latents, from memory or disk, gives the same bits as
    one that computed all of its tokens in one pass."""
    with Engine.load(folder, precision=precision) as engine:  # type: ignore[arg-type]
        first = prompt(engine)
        second = [*first[:common], *first[::-1][:100]]
        expected = engine.session().sync(second)
        cache = PrefixCache(engine, 1 << 30, folder=tmp_path, folder_bytes=1 << 30)
        session = cache.take(first)
        session.sync(first[:common])
        session.sync(first)
        cache.give_back(session)
        branch = cache.take(second)
        assert len(branch) == common
        np.testing.assert_array_equal(branch.sync(second), expected)
        cache.close()
        again = PrefixCache(engine, 1 << 30, folder=tmp_path, folder_bytes=1 << 30)
        branch = again.take(second)
        assert len(branch) == common
        np.testing.assert_array_equal(branch.sync(second), expected)
        again.close()
