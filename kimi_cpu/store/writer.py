"""Write a checkpoint in the Hugging Face layout: shards, index, config.json.

Used by tests and by the tools that make synthetic or trained checkpoints. Tensors are taken one
by one, so no more than one shard is ever in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimi_cpu.quant import GROUP_SIZE, Int4Weight
from kimi_cpu.store.checkpoint import INDEX_NAME, SINGLE_NAME
from kimi_cpu.store.safetensors import NUMPY_DTYPES

#: (name, array, dtype tag): uint16 bits for "BF16", float32 for "F32", "I32", "I64".
NamedTensor = tuple[str, npt.NDArray[Any], str]

#: `quantization_config` of a config.json, as published: what `int4_tensors` makes of experts.
QUANTIZATION: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": GROUP_SIZE,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def int4_tensors(name: str, weight: Int4Weight, shape_dtype: str = "I32") -> Iterator[NamedTensor]:
    """The three tensors of the INT4 linear layer `name`, as published."""
    packed = np.ascontiguousarray(weight.packed).view("<i4")
    shape = np.array(weight.shape, dtype=NUMPY_DTYPES[shape_dtype])
    yield f"{name}.weight_packed", packed, "I32"
    yield f"{name}.weight_scale", weight.scale, "BF16"
    yield f"{name}.weight_shape", shape, shape_dtype


def write_safetensors(path: Path, tensors: Iterable[NamedTensor]) -> None:
    """Write one file. Tensors are laid out by falling item size, so that all are aligned."""
    ordered = sorted(tensors, key=lambda t: -NUMPY_DTYPES[t[2]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array, tag in ordered:
        if array.dtype != NUMPY_DTYPES[tag]:
            raise ValueError(f"{name}: {array.dtype} is not stored as {tag}")
        header[name] = {
            "dtype": tag,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, array, _ in ordered:
            file.write(np.ascontiguousarray(array).data)


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[NamedTensor],
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write `config.json`, shards of at most about `shard_bytes`, and the index.

    A checkpoint that fits into one shard becomes a single `model.safetensors` without index,
    others `model-00001-of-000002.safetensors` and so on. Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    pending: list[NamedTensor] = []
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            write_safetensors(folder / f"shard-{len(shards) + 1}.part", pending)
            shards.append([name for name, _, _ in pending])
            pending, pending_bytes = [], 0

    for name, array, tag in tensors:
        if pending_bytes + array.nbytes > shard_bytes:
            flush()
        pending.append((name, array, tag))
        pending_bytes += array.nbytes
        total_bytes += array.nbytes
    flush()

    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        single = len(shards) == 1
        shard = SINGLE_NAME if single else f"model-{i:05d}-of-{len(shards):06d}.safetensors"
        (folder / f"shard-{i}.part").replace(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    return folder
