"""Engine = a loaded model; Session = one timeline of token ids on it.

Token ids only: text, messages and sampling live above. One engine serves any number of sessions;
a session belongs to one thread at a time.

Logits are the same in every bit for the same tokens, however they came to be computed: in one pass
or many, after a rewind, beside other sessions, from latents that were kept. There is one exception:
text without messages to which `step` has added tokens (see `attention_form`) is not what `sync`
makes of it, which therefore computes these tokens again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Literal, Self

import numpy as np

from kimi_cpu import hardware
from kimi_cpu.attention_form import EXPANDED, Keys, ids_of
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import ContextError, UsageError
from kimi_cpu.kernels.common import Precision
from kimi_cpu.kv_cache import LatentCache
from kimi_cpu.model import Ids, LayerProgress, Model
from kimi_cpu.quant import F32
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import Io
from kimi_cpu.store.experts.opening import open_experts
from kimi_cpu.store.experts.residency import ExpertStore

#: Tokens of a prompt computed in one sweep over the weights: bounds the memory of a pass, which for
#: Kimi K2 is 0.18 MB a token. Less if memory does not hold that beside a few experts.
PREFILL_CHUNK = 8192
#: The same where logits of every token are wanted: 0.65 MB a token more.
SCORE_CHUNK = 512

#: Which implementation of the kernels computes.
Backend = Literal["simd", "reference"]

#: Called with (tokens done, tokens in all) while a prompt is computed.
Progress = Callable[[int, int], None]


class Engine:
    """A checkpoint ready to compute. Make one with `Engine.load`.

    Attributes:
        config: the model's shape.
        precision: "fast" or "exact".
        threads: threads used by the kernels.
        experts: the store of its routed experts, which also counts what it does (`stats`).
    """

    def __init__(self, checkpoint: Checkpoint, model: Model) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self.config: ModelConfig = checkpoint.config
        self.precision: Precision = model.precision
        self.threads = model.threads
        self.experts: ExpertStore = model.experts

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        precision: Precision = "fast",
        threads: int | None = None,
        backend: Backend = "simd",
        memory: int | None = None,
        latents: int | None = 0,
        io: Io | Literal["auto"] = "auto",
        trace: Path | None = None,
        lookahead: bool = True,
    ) -> Self:
        """Open a checkpoint folder; weights stay on disk until they are needed.

        What `memory`, `latents`, `io`, `trace` and `lookahead` say changes speed alone, no token.

        Args:
            path: folder with `config.json` and safetensors, or one that `kimi-cpu repack` wrote.
            precision: "fast" (INT4 experts see int8 activations) or "exact" (float32 activations).
            threads: 1 to 1,024; the default is the number of physical cores that this process may
                use. The numbers computed do not depend on it.
            backend: "simd", or "reference" for plain NumPy, which is slow and is the definition.
            memory: bytes that may be used; by default what is available now, less a tenth
                or 1 GB.
            latents: bytes of them that are set aside for latents that are kept beside those of the
                sessions in use (`prefixes.PrefixCache`); None takes a tenth, or less if that leaves
                too little. `experts.latent_bytes` tells.
            io: how experts come from the disk, "mmap" or "direct"; "auto" takes what is faster.
            trace: file to which the routing of every token is written.
            lookahead: whether experts may be read before their router has spoken.

        Raises:
            UsageError: an argument is out of range, or there is too little memory.
            ConfigError, CheckpointError: the folder is not a checkpoint that can be run.
        """
        if precision not in ("fast", "exact"):
            raise UsageError(f"unknown precision {precision!r}", 'use "fast" or "exact"')
        if backend not in ("simd", "reference"):
            raise UsageError(f"unknown backend {backend!r}", 'use "simd" or "reference"')
        if threads is not None and not 1 <= threads <= hardware.MAX_THREADS:
            raise UsageError(
                f"{threads} threads make no sense", f"use 1 to {hardware.MAX_THREADS:,}"
            )
        checkpoint = Checkpoint.open(path)
        try:
            experts = open_experts(
                checkpoint, memory=memory, latents=latents, io=io, trace=trace, lookahead=lookahead
            )
        except BaseException:
            checkpoint.close()
            raise
        model = Model(
            checkpoint, experts, _kernels(backend), precision,
            threads or hardware.default_threads(),
        )  # fmt: skip
        return cls(checkpoint, model)

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self._checkpoint.folder

    @property
    def kernels_name(self) -> str:
        """The instruction set of the kernels, on which the last bits depend."""
        kernels = self._model.kernels
        name = str(getattr(kernels, "VARIANT", "reference"))
        return name + " + bf16 dot" if getattr(kernels, "HAS_BF16_DOT", False) else name

    def session(self) -> Session:
        """A new, empty timeline."""
        return Session(self._model)

    def keys(self, ids: Sequence[int] | Ids) -> Keys:
        """What tells apart the latents of a prompt's tokens, int32 [T]; see `attention_form`."""
        return self._model.forms.keys(ids)

    def step(self, sessions: Sequence[Session], tokens: Sequence[int]) -> F32:
        """Append one token to each of several sessions, all in one pass over the weights.

        Args:
            sessions: B >= 1 different sessions of this engine.
            tokens: the token of each.

        Returns:
            float32 [B, vocab_size], the logits after each token, bit for bit those of
            `Session.step`. A copy is not made: do not write to them.

        Raises:
            UsageError: the sessions are not different ones of this engine, one for each token.
            ContextError: an id lies outside the vocabulary, or a context is full. After any error
                all sessions are as before; after a Ctrl-C some may have got their token.
        """
        if not len(sessions) == len(tokens) > 0:
            raise UsageError(
                f"{len(tokens)} tokens for {len(sessions)} sessions", "pass one for each"
            )
        if len(set(map(id, sessions))) < len(sessions):
            raise UsageError("a session is given twice", "pass different sessions")
        if any(session._model is not self._model for session in sessions):
            raise UsageError("a session is of another engine", "make it with engine.session()")
        return _append_one(self._model, sessions, _checked(self.config, tokens))

    def score(self, ids: Iterable[int], progress: Progress | None = None) -> F32:
        """Logits at every position of `ids`, from a timeline of its own.

        Args:
            ids: T >= 1 token ids.
            progress: told how far the work is.

        Returns:
            float32 [T, vocab_size]; row t predicts the token after ids[: t + 1].

        Raises:
            ContextError: no ids, an id outside the vocabulary, or too many for the context.
        """
        tokens = _checked(self.config, ids)
        if not len(tokens):
            raise ContextError("there are no tokens to score", "pass at least one token id")
        cache = self._model.new_cache()
        expanded = self._model.forms.expanded(tokens)
        logits = np.empty((len(tokens), self.config.vocab_size), dtype=np.float32)
        for begin in range(0, len(tokens), SCORE_CHUNK):
            end = min(begin + SCORE_CHUNK, len(tokens))
            logits[begin:end] = self._model.forward(
                tokens[begin:end], cache, expanded[begin:end], all_logits=True
            )
            if progress is not None:
                progress(end, len(tokens))
        return logits

    def close(self) -> None:
        """Release the mapped files; sessions of this engine must not be used afterwards."""
        self.experts.close()
        self._checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class SessionSnapshot:
    """A session's state at one moment: its tokens' keys, latents and last logits."""

    keys: tuple[int, ...]
    cache: LatentCache
    logits: F32 | None


class Session:
    """One timeline: the tokens computed so far, and what the model says comes next."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._cache = model.new_cache()
        self._keys: list[int] = []
        self._logits: F32 | None = None  # of the last token; None after a rewind

    @property
    def tokens(self) -> tuple[int, ...]:
        """The timeline."""
        return ids_of(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def remaining(self) -> int:
        """How many more tokens the context can take."""
        return self._model.config.max_position_embeddings - len(self._keys)

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for latents now."""
        return self._cache.nbytes

    def common_prefix(self, ids: Sequence[int] | Ids) -> int:
        """How many tokens of `ids` a `sync` would find already computed."""
        return self._known(self._model.forms.keys(ids))

    def sync(self, ids: Iterable[int], progress: Progress | None = None) -> F32:
        """Make the timeline equal to `ids`, reusing the longest common prefix.

        Args:
            ids: the whole timeline, at least one token.
            progress: told (done, all) of the tokens that must be computed: after each layer, its
                share of them.

        Returns:
            float32 [vocab_size], the logits after the last token. A copy is not made: do not
            write to it.

        Raises:
            ContextError: no ids, an id outside the vocabulary, or too many for the context; the
                timeline is unchanged. When interrupted (Ctrl-C, between two kernels), the timeline
                keeps the sweeps of PREFILL_CHUNK tokens that were completed.
        """
        tokens = _checked(self._model.config, ids)
        if not len(tokens):
            raise ContextError("there are no tokens to compute", "pass at least one token id")
        if len(tokens) > self._model.config.max_position_embeddings:
            # Refused here, before the rewind below could lose anything.
            raise ContextError(
                f"{len(tokens):,} tokens do not fit the model's context of "
                f"{self._model.config.max_position_embeddings:,}",
                "shorten the prompt or start a new conversation",
            )
        keys = self._model.forms.keys(tokens)
        keep = self._known(keys)
        if keep == len(keys) and (keep < len(self._keys) or self._logits is None):
            keep -= 1  # its latents are known but its logits are not: compute the last one again
        self._truncate(keep)
        todo = keys[keep:]
        at_once = self._model.tokens_at_once(len(todo), PREFILL_CHUNK)
        for begin in range(0, len(todo), at_once):
            chunk = todo[begin : begin + at_once]

            def after_layer(
                done: int, layers: int, begin: int = begin, n: int = len(chunk)
            ) -> None:
                if progress is not None:
                    progress(begin + n * done // layers, len(todo))

            self._append(chunk, after_layer)
        assert self._logits is not None
        return self._logits

    def step(self, token: int) -> F32:
        """Append one generated token; float32 [vocab_size] logits after it (do not write to them).

        Raises:
            ContextError: the id lies outside the vocabulary, or the context is full.
        """
        logits: F32 = _append_one(self._model, [self], _checked(self._model.config, (token,)))[0]
        return logits

    def extend(self, ids: Iterable[int], progress: Progress | None = None) -> F32:
        """Append T >= 1 tokens of a prompt in one pass, which needs memory for the logits of each.

        Returns:
            float32 [T, vocab_size]; row t predicts the token after ids[t].

        Raises:
            ContextError: no ids, an id outside the vocabulary, or too many for the context.
        """
        tokens = _checked(self._model.config, ids)
        if not len(tokens):
            raise ContextError("there are no tokens to compute", "pass at least one token id")

        def after_layer(done: int, layers: int) -> None:
            if progress is not None:
                progress(len(tokens) * done // layers, len(tokens))

        whole = np.concatenate([np.array(self.tokens, dtype=np.int64), tokens])
        keys = self._model.forms.keys(whole)[len(self) :]
        return self._append(keys, after_layer, all_logits=True)

    def rewind(self, n: int) -> None:
        """Take back the last `n` tokens.

        Raises:
            ContextError: `n` is negative or more than there are.
        """
        if not 0 <= n <= len(self):
            raise ContextError(
                f"cannot take back {n} of {len(self)} tokens",
                "rewind by 0 up to the session's length",
            )
        self._truncate(len(self) - n)

    def snapshot(self) -> SessionSnapshot:
        """Keep the state; `restore` brings it back on any session of the same engine.

        Its latents are not copied: timelines share what they have in common.
        """
        return SessionSnapshot(tuple(self._keys), self._cache.branch(len(self)), self._logits)

    def restore(self, snapshot: SessionSnapshot) -> None:
        """Become what `snapshot` was."""
        self._keys, self._logits = [], None  # whatever interrupts the following
        self._cache.take_over(snapshot.cache)
        self._keys = list(snapshot.keys)
        self._logits = snapshot.logits

    def _known(self, keys: Keys) -> int:
        """How many of the first keys are those of the timeline."""
        count = 0
        for ours, theirs in zip(self._keys, keys.tolist(), strict=False):
            if ours != theirs:
                break
            count += 1
        return count

    def _append(
        self, keys: Keys, progress: LayerProgress | None = None, all_logits: bool = False
    ) -> F32:
        # A Ctrl-C may come at any of these lines: the cache may then be ahead of the tokens (cut
        # here), and logits that are not of the last token must not survive.
        self._cache.truncate(len(self._keys))
        self._logits = None
        expanded = keys >= EXPANDED
        ids = (keys & ~EXPANDED).astype(np.int64)
        logits = self._model.forward(ids, self._cache, expanded, all_logits, progress)
        self._keys.extend(keys.tolist())
        self._logits = logits[-1].copy() if all_logits else logits[-1]  # not all of them
        return logits

    def _truncate(self, length: int) -> None:
        if length < len(self._keys):
            self._logits = None
            del self._keys[length:]
            self._cache.truncate(length)


def _append_one(model: Model, sessions: Sequence[Session], ids: Ids) -> F32:
    """A token for each session; see `Session._append` for the order."""
    for session in sessions:
        session._cache.truncate(len(session._keys))
    logits = model.step(ids, [session._cache for session in sessions])
    for session, token, row in zip(sessions, ids.tolist(), logits, strict=True):
        session._logits = None
        session._keys.append(token)  # absorbed
        session._logits = row
    return logits


def _kernels(backend: Backend) -> ModuleType:
    if backend == "reference":
        from kimi_cpu.kernels import reference

        return reference
    from kimi_cpu.kernels import fast  # imports numba

    return fast


def _checked(config: ModelConfig, ids: Iterable[int]) -> Ids:
    """Token ids as int64 [T]; these numbers index weights in native code, so none may lie."""
    tokens = [operator.index(token) for token in ids]
    for position, token in enumerate(tokens):
        if not 0 <= token < config.vocab_size:
            raise ContextError(
                f"token id {token} at position {position} is outside the vocabulary of "
                f"{config.vocab_size:,}",
                "the tokenizer and the weights do not belong together",
            )
    return np.array(tokens, dtype=np.int64)
