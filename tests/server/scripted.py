"""A model that says what a script tells it, behind the engine's interface.

What comes next depends on the timeline alone, as with a real model: the reply to the last
generation prompt, continued where the timeline is a beginning of it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from kimi_cpu.chat.template import TEMPLATE_FILE, ChatTemplate
from kimi_cpu.cli.common import embedded_model
from kimi_cpu.engine import SessionSnapshot
from kimi_cpu.errors import ContextError, LowMemoryError
from kimi_cpu.kv_cache import BlockPool, LatentCache
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.server.settings import ServedModel
from kimi_cpu.store.experts.policy import Frequency
from kimi_cpu.store.experts.stats import ExpertStats
from kimi_cpu.tokenizer import Tokenizer
from tests.cli import fake

LAYERS = 4


class ScriptedEngine:
    """Makes sessions, and counts what they compute.

    computed: tokens, of prompts and replies. layers: of prompts, run so far.
    broken: raised by the next step. memory: most bytes of latents.
    gate: cleared, it holds prompts after a layer.
    """

    precision = "exact"
    kernels_name = "scripted"

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[str], str],
        *,
        context: int = 100_000,
        layer_s: float = 0.0,
        step_s: float = 0.0,
    ) -> None:
        self.config = SimpleNamespace(
            max_position_embeddings=context, eos_token_ids=(), moe_layers=[1, 2],
            vocab_size=tokenizer.n_vocab, num_hidden_layers=1, kv_lora_rank=4, qk_rope_head_dim=2,
        )  # fmt: skip
        self.pool = BlockPool(self.config)  # type: ignore[arg-type]
        self.folder = embedded_model()
        # What GET /routing looks at: nothing is ever chosen.
        self.experts = SimpleNamespace(
            n_experts=8, top_k=2, policy=Frequency(16), stats=lambda: ExpertStats()
        )
        self.tokenizer, self.script = tokenizer, script
        self.layer_s, self.step_s = layer_s, step_s
        self._turn: tuple[list[int], list[int]] = [], []  # the last prompt, and its reply
        self.computed = 0
        self.layers = 0
        self.sessions = 0
        self.closed = False
        self.broken: BaseException | None = None
        self.memory = 1 << 40
        self.gate = threading.Event()
        self.gate.set()

    def session(self) -> ScriptedSession:
        self.sessions += 1
        return ScriptedSession(self)

    @staticmethod
    def keys(ids) -> np.ndarray:
        return np.array(ids, np.int32)

    def step(self, sessions, tokens) -> np.ndarray:
        if self.broken is not None and len(sessions) > 1:
            raise self.broken  # which of them it was shows one by one
        return np.stack([s.step(token) for s, token in zip(sessions, tokens, strict=True)])

    def close(self) -> None:
        self.closed = True

    def logits(self, ids: list[int]) -> np.ndarray:
        tokenizer = self.tokenizer
        logits = np.full(tokenizer.n_vocab, -50, np.float32)
        begin = tokenizer.special_tokens["<|im_assistant|>"]
        middle = tokenizer.special_tokens["<|im_middle|>"]
        if begin not in ids:  # no conversation: nothing to say
            logits[tokenizer.control("<|im_end|>")] = 50
            return logits
        turn = len(ids) - 1 - ids[::-1].index(begin)
        start = next((i + 1 for i in range(turn, len(ids)) if ids[i] == middle), len(ids))
        closed = fake.spelt(tokenizer, "<think></think>")
        reply = self._reply(ids[:start])
        if ids[start : start + 2] == closed and reply[:2] != closed:  # thinking is off
            start += 2
            reply = self._reply(ids[:start])
        said = ids[start:]
        follows = reply[: len(said)] == said and len(said) < len(reply)
        logits[reply[len(said)] if follows else tokenizer.control("<|im_end|>")] = 50
        return logits

    def _reply(self, prompt: list[int]) -> list[int]:
        if self._turn[0] != prompt:
            text = self.script(self.tokenizer.decode(prompt))
            self._turn = prompt, fake.spelt(self.tokenizer, text)
        return self._turn[1]


class ScriptedSession:
    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self.ids: list[int] = []
        self._cache = LatentCache(engine.config, engine.pool)  # its rows hold nothing

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def remaining(self) -> int:
        return self._engine.config.max_position_embeddings - len(self.ids)

    def snapshot(self) -> SessionSnapshot:
        return SessionSnapshot(self.tokens, self._cache.branch(len(self)), None)

    def restore(self, snapshot: SessionSnapshot) -> None:
        self._cache.take_over(snapshot.cache)
        self.ids = list(snapshot.keys)

    def common_prefix(self, ids) -> int:
        n = 0
        while n < min(len(ids), len(self.ids)) and ids[n] == self.ids[n]:
            n += 1
        return n

    def sync(self, ids, progress=None) -> np.ndarray:
        keep = min(self.common_prefix(ids), len(ids) - 1)
        del self.ids[keep:]
        self._cache.truncate(keep)
        self._append(ids[keep:], progress)
        return self._engine.logits(self.ids)

    def extend(self, ids, progress=None) -> np.ndarray:
        before = len(self.ids)
        self._append(ids, progress)
        rows = range(before + 1, len(self.ids) + 1)
        return np.stack([self._engine.logits(self.ids[:n]) for n in rows])

    def step(self, token: int) -> np.ndarray:
        engine = self._engine
        if engine.broken is not None:
            error, engine.broken = engine.broken, None
            raise error
        if engine.step_s:
            time.sleep(engine.step_s)
        self._append([token], None)
        return engine.logits(self.ids)

    def _append(self, ids, progress) -> None:
        engine = self._engine
        if len(self.ids) + len(ids) > engine.config.max_position_embeddings:
            raise ContextError("the context is full")
        if engine.pool.used_bytes > engine.memory:
            raise LowMemoryError("--memory is too little", "Use more.")
        for layer in range(LAYERS if progress is not None else 0):
            if engine.layer_s:
                time.sleep(engine.layer_s)
            engine.layers += 1
            engine.gate.wait(20)
            progress(len(ids) * (layer + 1) // LAYERS, len(ids))
        self._cache.reserve(len(ids))
        self._cache.advance(len(ids))
        self.ids.extend(ids)
        engine.computed += len(ids)


def scripted_model(folder: Path, script: Callable[[str], str] = fake.script, **kw) -> ServedModel:
    """A model of single-byte tokens that says what `script` gives for the prompt.

    Its template is the nano model's, which keeps reasoning as Kimi's does.
    """
    fake.write_folder(folder)
    shutil.copy(embedded_model() / TEMPLATE_FILE, folder)
    tokenizer = Tokenizer.load(folder)
    engine = ScriptedEngine(tokenizer, script, **kw)
    defaults = SamplingParams(temperature=0)
    return ServedModel("scripted", engine, tokenizer, ChatTemplate.load(folder), defaults)  # type: ignore[arg-type]
