"""The compiled kernels behind the signatures of `kernels.reference`; see there for the meaning.

Importing this module imports numba and chooses the instruction set (`kernels.isa`); each kernel
is compiled, or loaded from the disk cache, when first called, or all by `compile_all`. Every
function may be called from several Python threads at once, and its result does not depend on
`threads`.
"""

from kimi_cpu.kernels import ops  # noqa: F401 - registers the operations
from kimi_cpu.kernels.attention_tile import HAS_BF16_DOT
from kimi_cpu.kernels.isa import VARIANT
from kimi_cpu.kernels.linears import (
    PackedQ8,
    add,
    linear,
    linear_q8,
    project,
    quantize_activations,
    rmsnorm,
    rope,
    silu_mul,
    split,
)
from kimi_cpu.kernels.mla import absorb_q, absorb_v, mla_decode, mla_prefill, store_latents
from kimi_cpu.kernels.routed import anticipate, moe, request, route
from kimi_cpu.kernels.threads import compile_all, recording

__all__ = [
    "HAS_BF16_DOT",
    "VARIANT",
    "PackedQ8",
    "absorb_q",
    "absorb_v",
    "add",
    "anticipate",
    "compile_all",
    "linear",
    "linear_q8",
    "mla_decode",
    "mla_prefill",
    "moe",
    "project",
    "quantize_activations",
    "recording",
    "request",
    "rmsnorm",
    "rope",
    "route",
    "silu_mul",
    "split",
    "store_latents",
]
