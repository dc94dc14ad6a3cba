"""What a plan has to know of a model: how many bytes of which kind a token reads, and where from.

Made from an open checkpoint, or from a config alone: as published, or as `kimi-cpu repack` would
write it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from kimi_cpu.config import ModelConfig
from kimi_cpu.config.reader import parse_json_object
from kimi_cpu.errors import ConfigError, UsageError
from kimi_cpu.quant import GROUP_SIZE, packed_shape
from kimi_cpu.store.checkpoint import MANIFEST_NAME, Checkpoint
from kimi_cpu.store.experts.budget import RESERVE_BYTES, Budget, make_budget
from kimi_cpu.store.layout import trunk_linears, vectors
from kimi_cpu.store.packed import keeps_its_form
from kimi_cpu.store.records import ALIGNMENTS, ExpertRecords

#: How a weight is stored, as far as speed goes: 16-bit and 32-bit floats, INT4 as published, INT4
#: and int8 in the kernels' order.
Kind = Literal["float", "int4", "packed4", "packed8"]
#: A layout of files: read in place, or repacked.
Form = Literal["published", "packed"]

#: Models that can be planned without having them: name -> what people call them.
KNOWN = {"k2-thinking": "Kimi K2 Thinking"}

#: Slots of direct reads begin and end at whole pages, for each range of a file.
_SLOT_SPARE = 16 << 10
_KIND_OF_DTYPE: dict[str, Kind] = {
    "BF16": "float", "F32": "float", "INT4": "packed4", "INT8": "packed8", "I32": "int4",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model in one form.

    Attributes:
        form: how its files are laid out.
        trunk: form of the trunk's linear layers: "bf16", "int8", "int4" or "mixed".
        trunk_kinds: bytes that every token reads besides routed experts, by kind; without the
            embedding, of which it reads one row.
        trunk_ops: additions and multiplications a token makes with them, by kind.
        trunk_kind: how most of the trunk is stored.
        shared_bytes, attention_bytes: of a layer's shared experts, and of its attention's
            projections, which belong to the trunk.
        expert_kind, expert_bytes: of one routed expert, as the kernels read it.
        slot_bytes: memory and disk that an expert takes.
        n_moe_layers, n_experts, top_k: layers with experts, experts in one, chosen in one.
        expert_ops: additions and multiplications of a token in one expert.
        attention_ops: of a token of a prompt with one earlier token, in all layers.
        context_ops: of a token that is decoded with one earlier token, in all layers.
        latent_bytes: of a token, in all layers.
    """

    form: Form
    trunk: str
    trunk_kinds: dict[Kind, int]
    trunk_ops: dict[Kind, int]
    trunk_kind: Kind
    shared_bytes: int
    attention_bytes: int
    expert_kind: Kind
    expert_bytes: int
    slot_bytes: int
    n_moe_layers: int
    n_experts: int
    top_k: int
    expert_ops: int
    attention_ops: int
    context_ops: int
    latent_bytes: int

    @property
    def trunk_bytes(self) -> int:
        """Bytes of the trunk that stay in memory."""
        return sum(self.trunk_kinds.values())

    @property
    def all_experts(self) -> int:
        """Routed experts of all layers."""
        return self.n_moe_layers * self.n_experts

    @property
    def token_expert_bytes(self) -> int:
        """Bytes of the routed experts of one token."""
        return self.n_moe_layers * self.top_k * self.expert_bytes

    def budget(self, memory: int) -> Budget:
        """How so many bytes of memory are divided."""
        return Budget(
            total_bytes=memory, trunk_bytes=self.trunk_bytes, reserve_bytes=RESERVE_BYTES,
            slot_bytes=self.slot_bytes, n_experts=self.all_experts, top_k=self.top_k, given=True,
        )  # fmt: skip

    @property
    def whole_bytes(self) -> int:
        """Memory in which everything fits."""
        return self.trunk_bytes + RESERVE_BYTES + self.all_experts * self.slot_bytes


def known_config(name: str) -> ModelConfig:
    """The config of a model in KNOWN. Raises UsageError."""
    if name not in KNOWN:
        raise UsageError(f"the shape of {name!r} is not known", f"Known: {', '.join(KNOWN)}.")
    file = resources.files("kimi_cpu.planning") / "models" / f"{name}.json"
    return ModelConfig.from_dict(parse_json_object(file.read_bytes(), file.name, ConfigError))


def shape_of_checkpoint(checkpoint: Checkpoint) -> Shape:
    """The shape of an open checkpoint, sizes as stored."""
    config = checkpoint.config
    kinds: dict[Kind, int] = {}
    skip = "" if config.tie_word_embeddings else "model.embed_tokens.weight"
    expert_dtype = "BF16"
    for name in checkpoint.names():
        entry = checkpoint.entry(name)
        if ".mlp.experts." in name:
            if entry.dtype in ("I32", "INT4"):
                expert_dtype = entry.dtype
        elif name != skip:
            kind = _KIND_OF_DTYPE.get(entry.dtype, "float")
            kinds[kind] = kinds.get(kind, 0) + entry.nbytes
    layers = config.moe_layers
    expert_bytes = 0
    if layers:
        extents = checkpoint.expert_extents(layers[0], 0)
        expert_bytes = sum(extent.length for extent in extents)
    packed = (checkpoint.folder / MANIFEST_NAME).exists()
    return _shape(
        config, "packed" if packed else "published", kinds, _KIND_OF_DTYPE[expert_dtype],
        expert_bytes, make_budget(checkpoint, 1).slot_bytes if layers else 0,
    )  # fmt: skip


def shape_of_config(config: ModelConfig, form: Form, trunk: str = "int8") -> Shape:
    """The shape of a model by its config.

    Args:
        form: as published (trunk in bf16, experts INT4 if the config says so), or repacked.
        trunk: for the packed form, one of "int8", "int4", "bf16".

    Raises UsageError if experts of such a size cannot be repacked.
    """
    kinds: dict[Kind, int] = {}

    def add(kind: Kind, n_bytes: int) -> None:
        kinds[kind] = kinds.get(kind, 0) + n_bytes

    for name, shape in vectors(config):
        if name != "model.embed_tokens.weight" or config.tie_word_embeddings:
            size = 4 if name.endswith("e_score_correction_bias") else 2
            add("float", size * math.prod(shape))
    for name, out_features, in_features in trunk_linears(config):
        kind = _packed_kind(name, in_features, trunk) if form == "packed" else "float"
        if kind == "float":
            add(kind, 2 * out_features * in_features)
        else:
            bits = 8 if kind == "packed8" else 4
            add(kind, math.prod(packed_shape(out_features, in_features, bits)))
    n = 3 * config.hidden_size * config.moe_intermediate_size
    if form == "packed":
        if not config.quantized:
            raise UsageError("only INT4 experts can be repacked", "Plan it as published.")
        try:
            records = ExpertRecords(config, ALIGNMENTS[0], 1)
        except ValueError as exc:
            raise UsageError(f"it cannot be repacked: {exc}", "Plan it as published.") from None
        return _shape(config, form, kinds, "packed4", records.record_bytes, records.stride)
    expert_bytes = n // 2 + 2 * n // GROUP_SIZE if config.quantized else 2 * n
    expert_kind: Kind = "int4" if config.quantized else "float"
    return _shape(config, form, kinds, expert_kind, expert_bytes, expert_bytes + _SLOT_SPARE)


def _packed_kind(name: str, in_features: int, trunk: str) -> Kind:
    """How repacking stores a linear layer of the trunk."""
    if trunk == "bf16" or keeps_its_form(name) or in_features % GROUP_SIZE:
        return "float"
    return "packed8" if trunk == "int8" else "packed4"


def _shape(
    config: ModelConfig, form: Form, kinds: dict[Kind, int], expert_kind: Kind, expert_bytes: int,
    slot_bytes: int,
) -> Shape:  # fmt: skip
    # Operations follow the bytes: what differs by kind is how many bits a weight has.
    bits: dict[Kind, float] = {"float": 16, "int4": 4.5, "packed4": 4.5, "packed8": 8.5}
    heads = 2 * config.num_attention_heads * config.num_hidden_layers
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    linear = [kind for kind in kinds if kind != "float" and kinds[kind] > sum(kinds.values()) / 2]
    expert_size = 3 * config.hidden_size * config.moe_intermediate_size
    trunk_kind: Kind = linear[0] if linear else "float"
    attention = sum(m * n for name, m, n in trunk_linears(config) if ".layers.0.self_attn." in name)
    names = {"packed8": "int8", "packed4": "int4", "int4": "int4"}
    return Shape(
        form=form,
        trunk=names[linear[0]] if linear else "bf16",
        trunk_kinds=kinds,
        trunk_ops={kind: int(2 * n * 8 / bits[kind]) for kind, n in kinds.items()},
        trunk_kind=trunk_kind,
        shared_bytes=int(config.n_shared_experts * expert_size * bits[trunk_kind] / 8),
        attention_bytes=int(attention * bits[trunk_kind] / 8),
        expert_kind=expert_kind,
        expert_bytes=expert_bytes,
        slot_bytes=slot_bytes,
        n_moe_layers=len(config.moe_layers),
        n_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        expert_ops=2 * expert_size,
        attention_ops=heads * (config.qk_head_dim + config.v_head_dim),
        context_ops=heads * (latent + config.kv_lora_rank),
        latent_bytes=4 * latent * config.num_hidden_layers,
    )


def forms(config: ModelConfig, checkpoint: Checkpoint | None) -> Iterator[Shape]:
    """What to plan: the checkpoint as it is, or the published form, and the repacked one."""
    own = (
        shape_of_config(config, "published")
        if checkpoint is None
        else shape_of_checkpoint(checkpoint)
    )
    yield own
    if own.form == "published" and own.expert_kind == "int4":
        yield shape_of_config(config, "packed")
