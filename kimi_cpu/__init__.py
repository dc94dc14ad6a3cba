"""kimi-cpu: Kimi K2 Thinking on the CPU you have.

    from kimi_cpu import Engine
    engine = Engine.load("path/to/checkpoint")
    session = engine.session()
    logits = session.sync([1, 2, 3])        # float32 [vocab_size]

Importing this package loads neither Numba nor a model: the names below are fetched when used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_cpu.engine import Engine, Session
    from kimi_cpu.sampling import SamplingParams
    from kimi_cpu.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "Session", "Tokenizer", "__version__"]

_HOME = {
    "Engine": "kimi_cpu.engine",
    "Session": "kimi_cpu.engine",
    "SamplingParams": "kimi_cpu.sampling",
    "Tokenizer": "kimi_cpu.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
