"""How far two checkpoints of one model are apart in what they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kimi_cpu import hardware
from kimi_cpu.engine import Engine
from kimi_cpu.errors import UserError
from kimi_cpu.quant import F32
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.tokenizer import Tokenizer

#: Tokens of a sample that is made of random ids.
RANDOM_TOKENS = 64

#: What memory a checkpoint may fill, so that scoring it does not go through the disk for minutes.
_MEMORY_SHARE = 0.8

SAMPLE_TEXT = """The tide tables for the harbour were printed every January, and every February \
somebody found a mistake in them. 17 * 24 = 408, of which 12 are odd. def area(r): return 3.14159 \
* r ** 2  # circles only. Der Zug nach Basel hat heute etwa zehn Minuten Verspätung. 今天下午有雨，\
记得带伞。{"name": "get_weather", "arguments": {"city": "Oslo"}} What she remembered of the island \
was the smell of thyme, the goats, and the long argument about whose boat it was. In 1869 the \
periodic table had gaps; Mendeleev left them open on purpose. La bibliothèque ferme à 19 h."""


@dataclass(frozen=True)
class Divergence:
    """Of the second checkpoint from the first, over a sample.

    Attributes:
        tokens: positions of the sample.
        source: what the sample is, in words.
        mean_kl, max_kl: KL divergence of a position's prediction, in nats.
        same_top: share of positions with the same likeliest token.
    """

    tokens: int
    source: str
    mean_kl: float
    max_kl: float
    same_top: float


def fits_in_memory(*folders: Path) -> bool:
    """Whether each of these checkpoints fits into the memory that is free."""
    available = hardware.detect().available_ram_bytes
    for folder in folders:
        checkpoint = Checkpoint.open(folder)
        checkpoint.close()
        if checkpoint.total_bytes > _MEMORY_SHARE * available:
            return False
    return True


def sample_ids(folder: Path, vocab_size: int) -> tuple[list[int], str]:
    """Token ids to compare on, and what they are: text, or random ids without a tokenizer."""
    try:
        ids = Tokenizer.load(folder).encode_text(SAMPLE_TEXT)
    except UserError:
        ids = []
    if ids and max(ids) < vocab_size:
        return ids, f"{len(ids)} tokens of text"
    random = np.random.default_rng(0).integers(vocab_size, size=RANDOM_TOKENS)
    return random.tolist(), f"{RANDOM_TOKENS} random tokens, as there is no tokenizer"


def divergence(
    first: Path, second: Path, progress: Callable[[int, int], None] | None = None
) -> Divergence:
    """Score a sample with both checkpoints, one after the other.

    Args:
        first, second: folders of one model in different forms; the tokenizer is the first's.
        progress: told (tokens done, tokens in all) over both.

    Raises:
        ConfigError, CheckpointError: a folder is not a checkpoint that can be run.
    """
    scored: list[F32] = []
    ids: Sequence[int] = []
    source = ""
    for folder in (first, second):
        with Engine.load(folder) as engine:
            if not ids:
                ids, source = sample_ids(folder, engine.config.vocab_size)
            before = len(scored) * len(ids)
            scored.append(
                engine.score(
                    ids,
                    lambda done, total, before=before: (  # type: ignore[misc]
                        progress(before + done, 2 * total) if progress else None
                    ),
                )
            )
    p, q = map(_log_softmax, scored)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    return Divergence(
        tokens=len(ids),
        source=source,
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        same_top=float((p.argmax(-1) == q.argmax(-1)).mean()),
    )


def _log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
