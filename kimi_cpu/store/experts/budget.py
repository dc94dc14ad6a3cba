"""How memory is divided: the trunk first, then a reserve, and what is left is for experts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kimi_cpu import hardware
from kimi_cpu.errors import LowMemoryError, UsageError
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import slot_bytes_of

#: For the interpreter, the compiled kernels and a pass's intermediate results. (Python with NumPy,
#: Numba and loaded kernels takes 0.2 to 0.25 GB.) The latents of the timelines come on top.
RESERVE_BYTES = 512 << 20
#: Of the memory that is available, this part is left to the system and to others by default, but
#: no more than so many bytes: what they grow by does not grow with the machine.
_LEFT_TO_OTHERS, _MOST_LEFT_TO_OTHERS = 0.1, 1 << 30

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of "16G", "512M", "1.5 GiB" or "1000000"; units are powers of 1024.

    Raises UsageError.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no amount of memory", "Write it like 16G or 512M.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(n_bytes: float) -> str:
    """As `parse_size` reads it, rounded: "15.3G"."""
    for unit in ("", "K", "M", "G"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f}{unit}" if not unit else f"{n_bytes:.1f}{unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f}T"


@dataclass(frozen=True)
class Budget:
    """What may be in memory.

    Attributes:
        total_bytes: all that the process may use.
        trunk_bytes: weights that every token passes; without the embedding, of which a token
            reads one row.
        reserve_bytes: RESERVE_BYTES.
        slot_bytes: what the largest expert takes.
        n_experts: all routed experts of the model.
        top_k: those that a token needs in one layer.
        given: whether the user said how much.
        latent_bytes: set aside for latents that are kept, whether they are there yet or not.
    """

    total_bytes: int
    trunk_bytes: int
    reserve_bytes: int
    slot_bytes: int
    n_experts: int
    top_k: int
    given: bool
    latent_bytes: int = 0

    @property
    def expert_bytes(self) -> int:
        """Left for experts and latents."""
        return max(self.total_bytes - self.trunk_bytes - self.reserve_bytes, 0)

    @property
    def floor_bytes(self) -> int:
        """The least that works: one layer's experts of one token, and the latents set aside."""
        return self._least_bytes(0)

    @property
    def holds_everything(self) -> bool:
        """Whether no expert will ever have to go."""
        return self.slots(0) >= self.n_experts

    def slots(self, latent_bytes: int) -> int:
        """Experts that may be resident beside so many bytes of latents; at most all."""
        if not self.n_experts:
            return 0
        beside = self.beside_experts(latent_bytes)
        return min((self.expert_bytes - beside) // self.slot_bytes, self.n_experts)

    def beside_experts(self, latent_bytes: int) -> int:
        """What experts do not get where there are so many bytes of latents.

        What is set aside is not given to them while there are fewer.
        """
        return max(latent_bytes, self.latent_bytes)

    def _least_bytes(self, latent_bytes: int) -> int:
        experts = self.top_k * self.slot_bytes
        beside = self.beside_experts(latent_bytes)
        return self.trunk_bytes + self.reserve_bytes + experts + beside

    def check(self, latent_bytes: int = 0) -> None:
        """Raises LowMemoryError if a token's experts do not fit, with the numbers."""
        if not self.n_experts or self.slots(latent_bytes) >= self.top_k:
            return
        source = "--memory is" if self.given else "the memory that may be used now is"
        parts = [
            f"{format_size(self.trunk_bytes)} of weights that every token needs",
            f"{self.top_k} experts of {format_size(self.slot_bytes)}",
            f"{format_size(self.reserve_bytes)} for the program",
        ]
        if latent_bytes > self.latent_bytes:
            parts.append(f"{format_size(latent_bytes)} for the conversation so far")
        elif self.latent_bytes:
            parts.append(f"{format_size(self.latent_bytes)} for what is kept (--cache-memory)")
        need = self._least_bytes(latent_bytes)
        hint = f"Use --memory {format_size(need * 1.05)} or more"
        if self.latent_bytes:
            hint += ", or a smaller --cache-memory"
        if not self.given:
            hint += "; close other programs, or use a smaller model"
        raise LowMemoryError(
            f"{source} {format_size(self.total_bytes)}, "
            f"at least {format_size(need)} is needed: {', '.join(parts)}",
            f"{hint}.",
        )


def default_memory() -> int:
    """Bytes that are used if nobody says how many: what is available now, less a tenth or 1 GB."""
    available = hardware.available_ram_bytes()
    return available - min(int(available * _LEFT_TO_OTHERS), _MOST_LEFT_TO_OTHERS)


def make_budget(
    checkpoint: Checkpoint, memory: int | None = None, latents: int | None = 0
) -> Budget:
    """Divide `memory` bytes, by default `default_memory`.

    latents: bytes set aside for latents that are kept; None takes a tenth of the memory, or half of
        what the least that works leaves, if that is less.
    """
    config = checkpoint.config
    layers = config.moe_layers
    trunk_bytes = checkpoint.trunk_bytes
    if not config.tie_word_embeddings:
        trunk_bytes -= checkpoint.entry("model.embed_tokens.weight").nbytes
    given = memory is not None
    if memory is None:
        memory = default_memory()
    n_experts = len(layers) * config.n_routed_experts
    slot_bytes = max(  # of 23,040 experts: half a second
        (
            slot_bytes_of(checkpoint.expert_extents(layer, expert))
            for layer in layers
            for expert in range(config.n_routed_experts)
        ),
        default=1,
    )
    budget = Budget(
        total_bytes=memory,
        trunk_bytes=trunk_bytes,
        reserve_bytes=RESERVE_BYTES,
        slot_bytes=slot_bytes,
        n_experts=n_experts,
        top_k=config.num_experts_per_tok,
        given=given,
    )
    if latents is None:
        latents = min(memory // 10, max(memory - budget.floor_bytes, 0) // 2)
    return replace(budget, latent_bytes=latents)
