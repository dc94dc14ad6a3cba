"""The architecture of DeepSeek-V3 / Kimi K2 in torch, made for training a very small model on CPU.

Parameters are float32; products run in bfloat16. Rows of several lengths are computed together:
everything but attention sees one flat list of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NanoConfig:
    """Shape of the model, names as in ``config.json``."""

    vocab_size: int
    hidden_size: int = 192
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 96
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    intermediate_size: int = 512
    moe_intermediate_size: int = 32
    shared_intermediate_size: int = 64
    n_routed_experts: int = 48
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    rope_factor: float = 8.0
    original_max_position_embeddings: int = 512

    @property
    def softmax_scale(self) -> float:
        mscale = 0.1 * math.log(self.rope_factor) + 1.0
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * mscale * mscale

    def inv_freq(self) -> Tensor:
        """YaRN frequencies, float32 [rope / 2], with beta_fast = beta_slow = 1."""
        dim, base = self.qk_rope_head_dim, self.rope_theta
        original = self.original_max_position_embeddings
        turn = dim * math.log(original / (2 * math.pi)) / (2 * math.log(base))
        low, high = max(math.floor(turn), 0), min(math.ceil(turn), dim - 1)
        freq = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        steps = torch.arange(dim // 2, dtype=torch.float64)
        ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
        return (freq / self.rope_factor * ramp + freq * (1 - ramp)).float()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


BLOCK = 64  # tokens of an expert are padded to this: few shapes, so few kernels to generate


class _Experts(torch.autograd.Function):
    """Routed experts on tokens sorted by expert: one product per expert."""

    @staticmethod
    def forward(ctx, x, weights, chosen, gate_up, down):  # type: ignore[no-untyped-def]
        flat, k = chosen.flatten(), chosen.shape[1]
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=gate_up.shape[0])
        padded = (counts + BLOCK - 1) // BLOCK * BLOCK
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        slot = torch.arange(len(order)) + shift[flat[order]]
        sizes, total, width = padded.tolist(), int(padded.sum()), down.shape[1]
        inverse = torch.empty_like(order)
        inverse[order] = slot
        inverse = inverse.view(-1, k)
        token = order.new_zeros(total)
        token[slot] = order // k
        scale = x.new_zeros(total, 1)  # padding weighs nothing
        scale[slot, 0] = weights.flatten()[order].to(x.dtype)
        xs = x[token]
        h = x.new_empty(total, 2 * width)
        for part, e in _parts(sizes):
            torch.mm(xs[part], gate_up[e], out=h[part])
        act = F.silu(h[:, :width]) * h[:, width:] * scale
        ys = torch.empty_like(xs)
        for part, e in _parts(sizes):
            torch.mm(act[part], down[e], out=ys[part])
        ctx.save_for_backward(xs, h, scale, gate_up, down, inverse, token)
        ctx.sizes = sizes
        return F.embedding_bag(inverse, ys, mode="sum")

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        xs, h, scale, gate_up, down, inverse, token = ctx.saved_tensors
        width = down.shape[1]
        dys = dy.contiguous()[token]
        g, u = h[:, :width], h[:, width:]
        sig = torch.sigmoid(g)
        silu = g * sig
        plain = silu * u
        act = plain * scale
        dact = torch.empty_like(act)
        ddown, dgate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        for part, e in _parts(ctx.sizes):
            torch.mm(dys[part], down[e].t(), out=dact[part])
            torch.mm(act[part].t(), dys[part], out=ddown[e])
        dweights = (dact.float() * plain.float()).sum(1)[inverse]
        dplain = dact * scale
        dh = torch.empty_like(h)
        torch.mul(dplain * u, sig + silu * (1 - sig), out=dh[:, :width])
        torch.mul(dplain, silu, out=dh[:, width:])
        dxs = torch.empty_like(xs)
        for part, e in _parts(ctx.sizes):
            torch.mm(dh[part], gate_up[e].t(), out=dxs[part])
            torch.mm(xs[part].t(), dh[part], out=dgate_up[e])
        return F.embedding_bag(inverse, dxs, mode="sum"), dweights, None, dgate_up, ddown


def _parts(sizes: list[int]) -> Iterator[tuple[slice, int]]:
    start = 0
    for e, n in enumerate(sizes):
        if n:
            yield slice(start, start + n), e
        start += n


def int4_round(w: Tensor) -> Tensor:
    """``w`` [E, in, out] after INT4 rounding in groups of 32 along ``in``, bfloat16 scales."""
    q, scale = int4_quantize(w)
    return (q * scale.repeat_interleave(32, dim=1)).to(w.dtype)


def int4_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [-8, 7] (float32 [E, in, out]) and bfloat16-exact scales [E, in / 32, out]."""
    e, d, o = w.shape
    groups = w.float().view(e, d // 32, 32, o)
    scale = (groups.abs().amax(2) / 7).clamp_min(1e-8).bfloat16().float()
    q = (groups / scale.unsqueeze(2)).round().clamp(-8, 7)
    return q.view(e, d, o), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs; ``x`` [N, H, P], ``cos`` and ``sin`` [N, 1, P / 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class Layer(nn.Module):
    """Attention and feed-forward of one layer; weights are [in, out] except where noted."""

    def __init__(self, c: NanoConfig, index: int) -> None:
        super().__init__()
        d, h = c.hidden_size, c.num_attention_heads
        self.c, self.dense = c, index < c.first_k_dense_replace
        self.input_norm = nn.Parameter(torch.ones(d))
        self.post_norm = nn.Parameter(torch.ones(d))
        self.q_a = _matrix(d, c.q_lora_rank)
        self.q_norm = nn.Parameter(torch.ones(c.q_lora_rank))
        self.q_b = _matrix(c.q_lora_rank, h * (c.qk_nope_head_dim + c.qk_rope_head_dim))
        self.kv_a = _matrix(d, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm = nn.Parameter(torch.ones(c.kv_lora_rank))
        self.kv_b = _matrix(c.kv_lora_rank, h * (c.qk_nope_head_dim + c.v_head_dim))
        self.o = _matrix(h * c.v_head_dim, d, residual=True)
        width = c.intermediate_size if self.dense else c.shared_intermediate_size
        self.gate_up = _matrix(d, 2 * width)
        self.down = _matrix(width, d, residual=True)
        if not self.dense:
            e, i = c.n_routed_experts, c.moe_intermediate_size
            self.router = nn.Parameter(torch.randn(d, e) * 0.02)
            self.experts_gate_up = _matrix(e, d, 2 * i)
            self.experts_down = _matrix(e, i, d, residual=True)
            self.register_buffer("bias", torch.zeros(e))
            self.load = torch.zeros(e)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, dt: torch.dtype) -> tuple[Tensor, ...]:
        """q [N, H, nope + rope] (scaled), k the same, v [N, H, v] for x [N, D]."""
        c, n = self.c, x.shape[0]
        y = rms_norm(x, self.input_norm, c.rms_norm_eps).to(dt)
        both = y @ torch.cat((self.q_a, self.kv_a), 1).to(dt)
        q_a, latent, k_pe = both.split((c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim), 1)
        q = rms_norm(q_a, self.q_norm, 1e-6).to(dt) @ self.q_b.to(dt)
        q = q.view(n, c.num_attention_heads, -1)
        q_nope, q_pe = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), 2)
        kv = rms_norm(latent, self.kv_norm, 1e-6).to(dt) @ self.kv_b.to(dt)
        kv = kv.view(n, c.num_attention_heads, -1)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), 2)
        k_pe = rotate(k_pe.unsqueeze(1), cos, sin).to(dt).expand(-1, c.num_attention_heads, -1)
        q = torch.cat((q_nope.float(), rotate(q_pe, cos, sin)), 2) * c.softmax_scale
        return q.to(dt), torch.cat((k_nope, k_pe), 2), v

    def feed_forward(
        self, x: Tensor, dt: torch.dtype, fake_int4: bool, real: Tensor | None = None
    ) -> Tensor:
        """Dense or mixture output for x [N, D]; ``real`` marks what counts as load (no padding)."""
        c = self.c
        normed = rms_norm(x, self.post_norm, c.rms_norm_eps)
        y = normed.to(dt)
        g, u = (y @ self.gate_up.to(dt)).chunk(2, 1)
        out = (F.silu(g) * u) @ self.down.to(dt)
        if self.dense:
            return out.float()
        scores = torch.sigmoid(normed @ self.router)
        with torch.no_grad():
            chosen = (scores + self.bias).topk(c.num_experts_per_tok, dim=1, sorted=False).indices
            counted = chosen if real is None else chosen[real]
            self.load += torch.bincount(counted.flatten(), minlength=c.n_routed_experts)
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        gate_up, down = self.experts_gate_up, self.experts_down
        if fake_int4:
            gate_up = gate_up + (int4_round(gate_up) - gate_up).detach()
            down = down + (int4_round(down) - down).detach()
        routed = _Experts.apply(y, weights, chosen, gate_up.to(dt), down.to(dt))
        return out.float() + routed.float()


def _matrix(*shape: int, residual: bool = False) -> nn.Parameter:
    std = shape[-2] ** -0.5 * (0.3 if residual else 0.7)
    return nn.Parameter(torch.randn(*shape) * std)


class Nano(nn.Module):
    """The whole model."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Parameter(torch.randn(c.vocab_size, c.hidden_size) * 0.3)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(c.hidden_size))
        self.head = nn.Parameter(torch.randn(c.hidden_size, c.vocab_size) * 0.02)
        self.register_buffer("inv_freq", c.inv_freq(), persistent=False)
        self.fake_int4 = False

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, rope / 2] for positions [N]."""
        angle = positions.float().unsqueeze(1) * self.inv_freq
        return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)

    def logits(self, x: Tensor, dt: torch.dtype) -> Tensor:
        return rms_norm(x, self.norm, self.c.rms_norm_eps).to(dt) @ self.head.to(dt)

    def loss(self, rows: list[dict[str, Tensor]], dt: torch.dtype = torch.bfloat16) -> Tensor:
        """Weighted mean cross entropy over buckets of rows (``ids``, ``positions``, ``labels``,
        ``weights`` [B, T]; ``mask`` bool [B, T, T])."""
        ids = torch.cat([r["ids"].flatten() for r in rows])
        cos, sin = self.angles(torch.cat([r["positions"].flatten() for r in rows]))
        labels = torch.cat([r["labels"].flatten() for r in rows])
        weights = torch.cat([r["weights"].flatten() for r in rows])
        masks = [
            torch.zeros(r["mask"].shape, dtype=dt).masked_fill_(~r["mask"], -1e9).unsqueeze(1)
            for r in rows
        ]
        keep = weights.nonzero().squeeze(1)
        spare = (weights == 0).nonzero().squeeze(1)[: -len(keep) % 256]
        keep = torch.cat((keep, spare))
        real = ids != self.c.vocab_size - 1  # [PAD] is the last id
        x = F.embedding(ids, self.embed)
        for index, layer in enumerate(self.layers):
            q, k, v = layer.project(x, cos, sin, dt)
            outs, start = [], 0
            for r, mask in zip(rows, masks, strict=True):
                b, t = r["ids"].shape
                qb, kb, vb = (
                    z[start : start + b * t]
                    .view(b, t, self.c.num_attention_heads, -1)
                    .transpose(1, 2)
                    for z in (q, k, v)
                )
                probs = torch.softmax(qb @ kb.transpose(2, 3) + mask, -1)
                outs.append((probs @ vb).transpose(1, 2).reshape(b * t, -1))
                start += b * t
            o = torch.cat(outs)
            if index + 1 == len(self.layers):  # only labelled tokens matter from here on
                x, o, real = x[keep], o[keep], real[keep]
            x = x + (o @ layer.o.to(dt)).float()
            x = x + layer.feed_forward(x, dt, self.fake_int4, real)
        each = F.cross_entropy(
            self.logits(x, dt).float(), labels[keep].clamp_min(0), reduction="none"
        )
        return (each * weights[keep]).sum() / weights.sum()

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, cache: list[Any], pads: Tensor,
             dt: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
        """Logits [B, T, V] for new ids [B, T]; ``cache`` holds k and v of each layer.

        Sequences are padded on the left; ``pads`` [B] counts the padding of each.
        """
        b, t = ids.shape
        heads = self.c.num_attention_heads
        cos, sin = self.angles(positions.flatten())
        x = F.embedding(ids.flatten(), self.embed)
        for index, layer in enumerate(self.layers):
            q, k, v = (
                z.view(b, t, heads, -1).transpose(1, 2) for z in layer.project(x, cos, sin, dt)
            )
            if cache[index] is not None:
                k = torch.cat((cache[index][0], k), 2)
                v = torch.cat((cache[index][1], v), 2)
            cache[index] = (k, v)
            total = k.shape[2]
            slot = torch.arange(total)
            sees = (slot[None, None] <= torch.arange(total - t, total)[None, :, None]) & (
                slot[None, None] >= pads[:, None, None]
            )
            sees = sees | (slot[None, None] == torch.arange(total - t, total)[None, :, None])
            scores = (q @ k.transpose(2, 3)).masked_fill(~sees.unsqueeze(1), -1e9)
            o = (torch.softmax(scores.float(), -1).to(dt) @ v).transpose(1, 2).reshape(b * t, -1)
            x = x + (o @ layer.o.to(dt)).float()
            x = x + layer.feed_forward(x, dt, self.fake_int4)
        return self.logits(x, dt).float().view(b, t, -1)
