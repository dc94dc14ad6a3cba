"""Kimi K2 (DeepSeek-V3 architecture), top to bottom, in one sitting.

Notable features:
- Multi-head latent attention (MLA): a token's keys and values of all heads are kept as one latent
  of `kv_lora_rank` numbers plus one rotated key of `qk_rope_head_dim` numbers shared by the heads.
- Attention in two forms, equal but for rounding: *absorbed* (the up-projections move to the query
  and the output; reads only latents; best for few tokens) and *expanded* (keys and values of all
  heads are computed once for many queries; best for long prompts). Each token's form follows from
  the tokens before it (`attention_form`), so its logits do not depend on how a prompt is cut.
- Mixture of experts: a sigmoid router picks `num_experts_per_tok` of `n_routed_experts`; a
  correction bias takes part in the choice but not in the weight. One shared expert always runs.
- The first `first_k_dense_replace` layers have a plain SwiGLU instead.
- YaRN RoPE on interleaved pairs; RMSNorm before each block; an untied head.

Shape letters: T tokens now computed, S tokens cached including these, D hidden_size, H heads,
N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim, R kv_lora_rank, Q q_lora_rank, E experts,
K experts per token, I intermediate size. Activations are float32 [T, ...]; weights stay as they
lie in the checkpoint (`quant.Weight`) and are [out_features, in_features].

Sources: DeepSeek-V2 (arXiv 2405.04434, section 2.1, MLA), DeepSeek-V3 (arXiv 2412.19437, section
2.1.2, routing), YaRN (arXiv 2309.00071); held against transformers' `DeepseekV3ForCausalLM`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kimi_cpu.attention_form import Bools, FormRule
from kimi_cpu.config import LATENT_NORM_EPS
from kimi_cpu.errors import CheckpointError, LowMemoryError
from kimi_cpu.kernels.common import FEW_TOKENS, I32, I64, ExpertTable, Latents, Precision
from kimi_cpu.kv_cache import BlockPool, LatentCache
from kimi_cpu.quant import F32, U16, Weight, as_f32, rows_of
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.residency import ExpertStore

if TYPE_CHECKING:  # importing it imports numba
    from kimi_cpu.kernels.threads import Tape

#: Heads whose keys and values exist at a time, and tokens in a SwiGLU, in the pass of a prompt.
HEADS_AT_ONCE = 16
MLP_TOKENS = 1024
#: Tokens whose absorbed queries, as wide as a latent in each head, exist at a time.
ABSORBED_TOKENS = 128
#: Choices a expert on average from which on a layer's experts count as all chosen (e^-4 are not).
NEARLY_ALL = 4
#: Activations of a pass that the expert store's reserve covers; more take the place of experts.
PASS_RESERVE = 128 << 20
#: Rows of a timeline for which a pass is recorded first.
_FIRST_ROWS = 4096

Ids = npt.NDArray[np.int64]
#: Called after each layer of a pass with (layers done, layers in all).
LayerProgress = Callable[[int, int], None]
#: Called with (a run of tokens, first head, end of heads).
Queries = Callable[[slice, int, int], tuple[F32, F32]]
Norm = U16 | F32


@dataclass(frozen=True)
class AttentionWeights:
    """`model.layers.L.self_attn.*`."""

    q_proj: Weight | None  # [H (N + P), D], only without q_lora_rank
    q_a_proj: Weight | None  # [Q, D]
    q_a_layernorm: Norm | None  # [Q]
    q_b_proj: Weight | None  # [H (N + P), Q]
    kv_a_proj_with_mqa: Weight  # [R + P, D]
    kv_a_layernorm: Norm  # [R]
    kv_b_proj: Weight  # [H (N + V), R]: per head W_UK [N, R], then W_UV [V, R]
    o_proj: Weight  # [D, H V]


@dataclass(frozen=True)
class MLPWeights:
    """A SwiGLU: `mlp.*` of a dense layer, or `mlp.shared_experts.*`."""

    gate_proj: Weight  # [I, D]
    up_proj: Weight  # [I, D]
    down_proj: Weight  # [D, I]


@dataclass(frozen=True)
class MoEWeights:
    """`model.layers.L.mlp.*` of a layer with routed experts."""

    gate: Weight  # router, [E, D]
    e_score_correction_bias: F32  # [E]
    experts: ExpertTable
    shared_experts: MLPWeights | None


@dataclass(frozen=True)
class Layer:
    input_layernorm: Norm  # [D]
    self_attn: AttentionWeights
    post_attention_layernorm: Norm  # [D]
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True)
class Inputs:
    """What a pass starts from."""

    x: F32  # embeddings, [B T, D]
    cos: F32  # [B T, P / 2]
    sin: F32  # [B T, P / 2]
    tables: I64  # [B], address of each timeline's table of blocks, see `kernels.common.Latents`
    starts: I64  # [B], position of each timeline's first token
    rows: int  # no timeline has more rows, these tokens included
    absorbed: tuple[slice, ...]  # runs of tokens whose attention has this form, and the others
    expanded: tuple[slice, ...]

    def take(self, other: Inputs) -> None:
        """Take over the other's values, in place."""
        for name in ("x", "cos", "sin", "tables", "starts"):
            np.copyto(getattr(self, name), getattr(other, name))


@dataclass(frozen=True)
class RecordedPass:
    """A token of each of B timelines: fill `inputs`, play `tape`, read `logits`."""

    inputs: Inputs
    tape: Tape
    logits: F32  # [B, vocab]
    looks_ahead: bool


class Model:
    """The network of one checkpoint: token ids and a latent cache in, logits out.

    Args:
        checkpoint: an open, validated checkpoint; weights are read in place.
        experts: brings its routed experts into memory; several models may share it.
        kernels: `kernels.reference` or `kernels.fast`; both have the same functions.
        precision: "exact" (float32 activations, the oracle's numbers) or "fast" (quantised
            weights see int8 activations in groups of 32).
        threads: how many threads the kernels may use; results do not depend on it.
    """

    def __init__(
        self, checkpoint: Checkpoint, experts: ExpertStore, kernels: ModuleType,
        precision: Precision, threads: int,
    ) -> None:  # fmt: skip
        self.config = checkpoint.config
        self.experts = experts
        self.kernels = kernels
        self.precision: Precision = precision
        self.threads = threads
        self._find_non_finite = checkpoint.find_non_finite
        self._replays = kernels.recording is not None
        self._passes: dict[int, RecordedPass] = {}  # by the number of timelines
        self._replay_lock = threading.Lock()  # a pass has one set of inputs for all threads
        self._pool = BlockPool(checkpoint.config)
        self.forms = FormRule.of(checkpoint.config, checkpoint.folder)
        self._inv_freq = self.config.inv_freq()  # float64 [P / 2]
        self.embed_tokens = checkpoint.tensor("model.embed_tokens.weight")  # [vocab, D]
        self.layers = [
            self._load_layer(checkpoint, i) for i in range(self.config.num_hidden_layers)
        ]
        self.norm = checkpoint.tensor("model.norm.weight")  # [D]
        self.lm_head = checkpoint.linear("lm_head")  # [vocab, D]

    def new_cache(self) -> LatentCache:
        """An empty cache of this model's shape."""
        return LatentCache(self.config, self._pool)

    @property
    def token_bytes(self) -> int:
        """About the memory of a token's activations that live through a pass of many."""
        c = self.config
        return 4 * (5 * c.hidden_size + c.num_attention_heads * c.v_head_dim)

    def tokens_at_once(self, prompt: int, most: int) -> int:
        """How many of a prompt's tokens a pass may take: `most`, or fewer if memory is short."""
        latents = prompt * self._pool.layers * self._pool.row_bytes
        spare = self.experts.spare_bytes(self.latent_bytes() + latents)
        return max(min(most, (PASS_RESERVE + spare) // self.token_bytes), 1)

    def latent_bytes(self) -> int:
        """Bytes of the latents of all timelines; what several share counts once."""
        return self._pool.used_bytes

    def forward(
        self,
        ids: Ids,
        cache: LatentCache,
        expanded: Bools,
        all_logits: bool = False,
        progress: LayerProgress | None = None,
    ) -> F32:
        """Compute the tokens that follow those in `cache`, and append them to it.

        All tokens pass a layer before the next one begins, and in it all tokens of an expert
        before the next expert: however many there are, a routed expert is read once.

        Args:
            ids: int64 [T], T >= 1, each within the vocabulary.
            cache: the latents of all earlier tokens.
            expanded: bool [T], the form of each token's attention.
            all_logits: return logits of every token instead of the last one only.
            progress: told how far a pass of several tokens is.

        Returns:
            float32 [T, vocab_size] or [1, vocab_size].

        Raises:
            ContextError: the tokens do not fit the context.
            UsageError: beside them there is too little memory for the experts of a token.
            CheckpointError: a weight is damaged (not finite) or cannot be read any more. In all
                cases the cache is unchanged.
        """
        runs = _runs(~expanded, ABSORBED_TOKENS), _runs(expanded, len(ids))
        return self._pass_over(ids, [cache], *runs, all_logits, progress)

    def step(self, ids: Ids, caches: Sequence[LatentCache]) -> F32:
        """Compute the next token of each of B timelines, all in one pass: a weight is read once.

        Their attention is absorbed.

        Args:
            ids: int64 [B], each within the vocabulary.
            caches: the latents of all earlier tokens of each timeline, B different ones.

        Returns:
            float32 [B, vocab_size], each row bit for bit what `forward` of its token, absorbed,
            would give.

        Raises:
            As `forward`; all caches are then unchanged.
        """
        return self._pass_over(ids, caches, (slice(0, len(ids)),), (), all_logits=True)

    def _pass_over(
        self,
        ids: Ids,
        caches: Sequence[LatentCache],
        absorbed: tuple[slice, ...],
        expanded: tuple[slice, ...],
        all_logits: bool,
        progress: LayerProgress | None = None,
    ) -> F32:
        tokens = len(ids) // len(caches)
        for cache in caches:
            cache.reserve(tokens)
        beside = self.latent_bytes() + max(len(ids) * self.token_bytes - PASS_RESERVE, 0)
        try:
            with self.experts.passing(len(ids), beside):
                inputs = self._inputs(ids, caches, absorbed, expanded)
                if tokens == 1 and not expanded and self._can_replay(len(ids)):
                    logits = self._replay(inputs)
                else:
                    logits = self._compute(inputs, all_logits, progress)
        except LowMemoryError:
            for cache in caches:  # what was reserved must not make the next pass fail, too
                cache.truncate(cache.length)
            raise
        if not np.isfinite(logits).all():
            raise self._find_non_finite() or CheckpointError(
                "the model computed logits that are not finite, though its trunk is",
                "an expert may be damaged: download the weights again, or try precision exact",
            )
        for cache in caches:
            cache.advance(tokens)
        return logits

    def _compute(
        self,
        inputs: Inputs,
        all_logits: bool,
        progress: LayerProgress | None = None,
    ) -> F32:
        """The network from embeddings to logits.

        Only kernels touch numbers here, so that a pass of few tokens can be recorded once and
        played again with other inputs (see `_replay`).
        """
        k, x = self.kernels, inputs.x  # [T, D]
        for i, layer in enumerate(self.layers):
            mlp, done = layer.mlp, i + 1
            # After the last attention no token needs another: only those asked for go on.
            wanted = slice(None) if all_logits or done < len(self.layers) else slice(-1, None)
            self._read_nearly_all(i, len(x), all_logits)
            if i and not isinstance(self.layers[i - 1].mlp, MoEWeights):
                self._look_ahead(i, x)
            h = self._rmsnorm(x, layer.input_layernorm)
            x = k.add(x, self._attention(i, h, inputs))[wanted]
            h = self._rmsnorm(x, layer.post_attention_layernorm)
            if isinstance(mlp, MoEWeights):
                ids, weights = self._route(mlp, h)  # [T, K], [T, K]
                k.request(mlp.experts, ids)  # missing ones are read while others are computed
                self._look_ahead(done, x)
                x = k.add(x, self._moe(mlp, h, ids, weights))
            else:
                x = k.add(x, self._mlp(mlp, h))
            if progress is not None:
                progress(done, len(self.layers))
        return self._linear(self._rmsnorm(x, self.norm), self.lm_head)

    def _can_replay(self, timelines: int) -> bool:
        # What several tokens choose is written down by Python only.
        return (
            self._replays
            and timelines <= FEW_TOKENS
            and not (timelines > 1 and self.experts.records)
        )

    def _replay(self, inputs: Inputs) -> F32:
        """`_compute` of a token of each timeline by a tape of kernel calls, recorded once.

        Python then costs a few microseconds a token instead of a few a kernel.
        """
        timelines, looks_ahead = len(inputs.starts), self._looks_ahead
        with self._replay_lock:
            recorded = self._passes.get(timelines)
            if (
                recorded is None
                or recorded.inputs.rows < inputs.rows
                or recorded.looks_ahead != looks_ahead
            ):
                # Work space is sized for the rows: recorded again when they have doubled.
                rows = max(1 << (inputs.rows - 1).bit_length(), _FIRST_ROWS)
                inputs = replace(inputs, rows=rows)
                with self.kernels.recording() as tape:
                    logits = self._compute(inputs, all_logits=True)
                recorded = RecordedPass(inputs, tape, logits, looks_ahead)
                self._passes[timelines] = recorded
            else:
                recorded.inputs.take(inputs)
            recorded.tape.play(self.threads)
            return recorded.logits.copy()

    def _attention(self, layer: int, x: F32, inputs: Inputs) -> F32:
        """MLA over the cached latents and these tokens; [T, D] -> [T, D].

        Several timelines have one token each.
        """
        w, c, k = self.layers[layer].self_attn, self.config, self.kernels
        cos, sin, tokens = inputs.cos, inputs.sin, x.shape[0]

        if w.q_proj is not None:
            q_input, q_weight = x, w.q_proj
        else:
            assert w.q_a_proj is not None and w.q_a_layernorm is not None and w.q_b_proj is not None
            q_a = self._linear(x, w.q_a_proj)  # [T, Q]
            q_input, q_weight = k.rmsnorm(q_a, w.q_a_layernorm, LATENT_NORM_EPS), w.q_b_proj

        kv_a = self._linear(x, w.kv_a_proj_with_mqa)
        c_kv, k_pe = k.split(kv_a, c.kv_lora_rank)  # [T, R], [T, P]: one key for all heads
        c_kv = k.rmsnorm(c_kv, w.kv_a_layernorm, LATENT_NORM_EPS)
        k_pe = k.rope(k_pe[:, None], cos, sin)[:, 0]
        latents = self._pool.latents(layer, inputs.tables, inputs.starts, inputs.rows)
        k.store_latents(c_kv, k_pe, latents)

        def queries(run: slice, first: int, last: int) -> tuple[F32, F32]:
            """q_nope [t, h, N] and q_pe [t, h, P] of a run of t tokens in heads first .. last-1."""
            rows = rows_of(q_weight, first * c.qk_head_dim, last * c.qk_head_dim)
            q = self._linear(q_input[run], rows).reshape(-1, last - first, c.qk_head_dim)
            q_nope, q_pe = k.split(q, c.qk_nope_head_dim)
            return q_nope, k.rope(q_pe, cos[run], sin[run])

        if inputs.absorbed == (slice(0, tokens),):  # may be recorded: kernels only
            o = self._absorbed(w.kv_b_proj, inputs.absorbed[0], queries, latents)
        else:
            o = np.empty((tokens, c.num_attention_heads, c.v_head_dim), dtype=np.float32)
            for run in inputs.absorbed:
                o[run] = self._absorbed(w.kv_b_proj, run, queries, latents)
            if inputs.expanded:
                self._expanded(w.kv_b_proj, inputs.expanded, queries, latents, o)
        return self._linear(o.reshape(tokens, c.num_attention_heads * c.v_head_dim), w.o_proj)

    def _absorbed(self, kv_b: Weight, run: slice, queries: Queries, latents: Latents) -> F32:
        """Attention of a run of t tokens, or of one of each timeline, to latents; [t, H, V]."""
        c, k = self.config, self.kernels
        q_nope, q_pe = queries(run, 0, c.num_attention_heads)
        q_latent = k.absorb_q(q_nope, kv_b, self.threads)  # [t, H, R]
        here = latents.later(run.start) if run.start else latents
        o_latent = k.mla_decode(q_latent, q_pe, here, c.softmax_scale, self.threads)  # [t, H, R]
        o: F32 = k.absorb_v(o_latent, kv_b, c.v_head_dim, self.threads)
        return o

    def _expanded(
        self, kv_b: Weight, runs: Sequence[slice], queries: Queries, latents: Latents, o: F32
    ) -> None:
        """Attention of runs of tokens to the keys and values of all cached ones, into o [T, H, V].

        S: tokens up to the end of the last run.
        """
        c, k = self.config, self.kernels
        heads, head_rows = c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim
        start = int(latents.starts[0])
        end = start + runs[-1].stop
        c_kv, k_pe = latents.gather(0, end)  # [S, R], [S, P]
        for first in range(0, heads, HEADS_AT_ONCE):  # bounds the memory of keys and values
            last = min(first + HEADS_AT_ONCE, heads)
            kv = self._linear(c_kv, rows_of(kv_b, first * head_rows, last * head_rows))
            kv = kv.reshape(end, last - first, head_rows)  # [S, h, N + V]
            for run in runs:
                q_nope, q_pe = queries(run, first, last)
                o[run, first:last] = k.mla_prefill(
                    q_nope, q_pe, kv, k_pe, start + run.start, c.softmax_scale, self.threads
                )

    def _read_nearly_all(self, i: int, tokens: int, all_logits: bool) -> None:
        """Before layer i: begin to read its experts, or the next layer's if it is dense.

        If the tokens will choose nearly all of them, that need not wait for its router.
        """
        layers = self.layers if all_logits else self.layers[:-1]  # the last sees one token
        mlp = next((w.mlp for w in layers[i:] if isinstance(w.mlp, MoEWeights)), None)
        if mlp is None or tokens <= FEW_TOKENS:
            return
        if tokens * self.config.num_experts_per_tok > NEARLY_ALL * len(mlp.experts):
            mlp.experts.source.request(range(len(mlp.experts)))

    def _look_ahead(self, i: int, x: F32) -> None:
        """Have experts read that one token will probably choose in layer i, when the disk is free.

        Its router is asked about the residual x [1, D] of one layer before, which changes little
        from there. A dense layer changes more (`bench.guesses`): behind one, x comes from after it.
        """
        layer = self.layers[i] if i < len(self.layers) and self._looks_ahead else None
        if layer is not None and isinstance(layer.mlp, MoEWeights) and len(x) == 1:
            h = self._rmsnorm(x, layer.post_attention_layernorm)
            self.kernels.anticipate(layer.mlp.experts, self._route(layer.mlp, h)[0])

    def _moe(self, w: MoEWeights, x: F32, ids: I32, weights: F32) -> F32:
        """Routed experts plus the shared one; [T, D], [T, K], [T, K] -> [T, D]."""
        k = self.kernels
        shared = None if w.shared_experts is None else self._mlp(w.shared_experts, x)
        routed: F32 = k.moe(x, w.experts, ids, weights, self.precision, self.threads)
        return routed if shared is None else k.add(routed, shared)

    def _route(self, w: MoEWeights, x: F32) -> tuple[I32, F32]:
        """The chosen experts, int32 [T, K], and their weights [T, K]."""
        c = self.config
        chosen: tuple[I32, F32] = self.kernels.route(
            self._linear(x, w.gate),  # [T, E]
            w.e_score_correction_bias,
            c.n_group,
            c.topk_group,
            c.num_experts_per_tok,
            c.norm_topk_prob,
            c.routed_scaling_factor,
        )
        return chosen

    @property
    def _looks_ahead(self) -> bool:
        """Whether a token's experts are guessed before its attention is computed."""
        return bool(self.experts.looks_ahead[0])

    def _mlp(self, w: MLPWeights, x: F32) -> F32:
        """SwiGLU: down(silu(gate x) * up x); [T, D] -> [T, D]."""
        if len(x) > MLP_TOKENS:  # bounds the memory of the intermediate [T, I]
            parts = [self._mlp(w, x[t : t + MLP_TOKENS]) for t in range(0, len(x), MLP_TOKENS)]
            return np.concatenate(parts)
        h = self.kernels.silu_mul(self._linear(x, w.gate_proj), self._linear(x, w.up_proj))
        return self._linear(h, w.down_proj)

    def _linear(self, x: F32, w: Weight) -> F32:
        y: F32 = self.kernels.project(x, w, self.precision, self.threads)
        return y

    def _rmsnorm(self, x: F32, w: Norm) -> F32:
        y: F32 = self.kernels.rmsnorm(x, w, self.config.rms_norm_eps)
        return y

    def _inputs(
        self,
        ids: Ids,
        caches: Sequence[LatentCache],
        absorbed: tuple[slice, ...],
        expanded: tuple[slice, ...],
    ) -> Inputs:
        """Embeddings and rotary tables of the tokens `ids`, as many for each cache."""
        tokens = len(ids) // len(caches)
        starts = np.array([cache.length for cache in caches], dtype=np.int64)
        positions = (starts[:, None] + np.arange(tokens)).ravel()
        angles = np.outer(positions.astype(np.float64), self._inv_freq)
        scale = self.config.rope_attention_scale
        return Inputs(
            x=np.array(as_f32(self.embed_tokens[ids])),
            cos=(np.cos(angles) * scale).astype(np.float32),
            sin=(np.sin(angles) * scale).astype(np.float32),
            tables=np.array([cache.table_address for cache in caches], dtype=np.int64),
            starts=starts,
            rows=int(starts.max()) + tokens,
            absorbed=absorbed,
            expanded=expanded,
        )

    def _load_layer(self, checkpoint: Checkpoint, i: int) -> Layer:
        c, prefix = self.config, f"model.layers.{i}."
        attn = prefix + "self_attn."
        lora = c.q_lora_rank is not None
        self_attn = AttentionWeights(
            q_proj=None if lora else checkpoint.linear(attn + "q_proj"),
            q_a_proj=checkpoint.linear(attn + "q_a_proj") if lora else None,
            q_a_layernorm=checkpoint.tensor(attn + "q_a_layernorm.weight") if lora else None,
            q_b_proj=checkpoint.linear(attn + "q_b_proj") if lora else None,
            kv_a_proj_with_mqa=checkpoint.linear(attn + "kv_a_proj_with_mqa"),
            kv_a_layernorm=checkpoint.tensor(attn + "kv_a_layernorm.weight"),
            kv_b_proj=checkpoint.linear(attn + "kv_b_proj"),
            o_proj=checkpoint.linear(attn + "o_proj"),
        )
        mlp: MLPWeights | MoEWeights
        if c.is_dense_layer(i):
            mlp = _load_mlp(checkpoint, prefix + "mlp.")
        else:
            mlp = MoEWeights(
                gate=checkpoint.linear(prefix + "mlp.gate"),
                e_score_correction_bias=as_f32(
                    checkpoint.tensor(prefix + "mlp.gate.e_score_correction_bias")
                ),
                experts=self._expert_table(i),
                shared_experts=(
                    _load_mlp(checkpoint, prefix + "mlp.shared_experts.")
                    if c.n_shared_experts
                    else None
                ),
            )
        return Layer(
            input_layernorm=checkpoint.tensor(prefix + "input_layernorm.weight"),
            self_attn=self_attn,
            post_attention_layernorm=checkpoint.tensor(prefix + "post_attention_layernorm.weight"),
            mlp=mlp,
        )

    def _expert_table(self, i: int) -> ExpertTable:
        """Layer i's, which all models on the same store have in common."""
        c, source = self.config, self.experts.layer(i)
        if source.shelf is None:
            source.put_on(
                ExpertTable(source, c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
            )
        assert isinstance(source.shelf, ExpertTable)
        return source.shelf


def _runs(which: Bools, longest: int) -> tuple[slice, ...]:
    """The runs of true elements, longer ones in parts."""
    borders = np.flatnonzero(np.diff(which, prepend=False, append=False)).tolist()
    return tuple(
        slice(first, min(first + longest, stop))
        for begin, stop in zip(borders[::2], borders[1::2], strict=True)
        for first in range(begin, stop, longest)
    )


def _load_mlp(checkpoint: Checkpoint, prefix: str) -> MLPWeights:
    return MLPWeights(
        gate_proj=checkpoint.linear(prefix + "gate_proj"),
        up_proj=checkpoint.linear(prefix + "up_proj"),
        down_proj=checkpoint.linear(prefix + "down_proj"),
    )
