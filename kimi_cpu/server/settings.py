"""What the operator of a server decides, and what is served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_cpu.chat.template import ChatTemplate
    from kimi_cpu.engine import Engine
    from kimi_cpu.sampling import SamplingParams
    from kimi_cpu.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """host: as bound; Host headers are checked against it unless an API key guards the server.
    api_key: without one anybody who reaches the server may use it.
    cors_origins: web origins whose pages may use the server, or `*`.
    max_body_bytes: of one request; max_bodies_bytes: of all that are not answered yet.
    max_active: replies that are computed in turns; max_waiting: requests that wait for one of
        those places, further ones are refused (429).
    prefill_slice: tokens of a prompt computed between two decode steps.
    cache_dir: folder where latents are kept that memory has no room for, and all at the end; none
        by default. cache_bytes: what may lie there. The replies that clients may send back are kept
        there, too.
    log_prompts: file to which the text of all prompts and replies is written; none by default.
    heartbeat_s: silence after which a stream gets a comment, so that nobody thinks it is dead.
    shutdown_s: how long replies may go on when the server is told to stop.
    save_s: how long latents may be written after that.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_bodies_bytes: int = 64 << 20
    max_active: int = 8
    max_waiting: int = 64
    prefill_slice: int = 512
    cache_dir: Path | None = None
    cache_bytes: int = 16 << 30
    log_prompts: Path | None = None
    heartbeat_s: float = 5.0
    shutdown_s: float = 10.0
    save_s: float = 10.0


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and what is known about it.

    defaults: the sampling parameters that the checkpoint recommends.
    ceiling_tps: tokens a second that the machine's memory allows a reply, where that is the limit.
    session_bytes: of memory, latents kept for later requests; the engine was told of them.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: SamplingParams
    ceiling_tps: float | None = None
    session_bytes: int = 1 << 30

    @property
    def context(self) -> int:
        """Most tokens of prompt and reply together."""
        return self.engine.config.max_position_embeddings
