"""The tensors of a checkpoint against its config: names, shapes and dtypes, before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TypeVar

from kimi_cpu.config import ModelConfig
from kimi_cpu.config.reader import shown
from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import GROUP_SIZE
from kimi_cpu.store.layout import expert_linears, trunk_linears, vectors
from kimi_cpu.store.safetensors import SafetensorsHeader

_INCOMPLETE = "The download is incomplete, or config.json belongs to another model."
_MISMATCH = "config.json and the weights belong to different models, or the file is damaged."
_SKIPPED_PREFIXES = ("vision_tower.", "mm_projector.")
#: Dtypes of dense tensors.
DENSE = ("BF16", "F32")

Header = TypeVar("Header", bound=SafetensorsHeader)


def select(config: ModelConfig, stored: dict[str, Header]) -> dict[str, Header]:
    """The language model's tensors under their names without prefix; known others are skipped.

    Skipped: K2.5's vision tower and projector, multi-token prediction layers that the config
    announces, saved rotary buffers, and a head that the config ties to the embedding.
    """
    prefix = config.tensor_prefix
    extra_layers = tuple(
        f"model.layers.{config.num_hidden_layers + i}."
        for i in range(config.num_nextn_predict_layers)
    )
    tensors: dict[str, Header] = {}
    for stored_name, file in stored.items():
        name = stored_name
        if prefix:
            if name.startswith(_SKIPPED_PREFIXES):
                continue
            if not name.startswith(prefix):
                raise surplus(file, stored_name)
            name = name[len(prefix) :]
        if extra_layers and name.startswith(extra_layers):
            continue
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[name] = file
    return tensors


def check_against_config(
    folder: Path, config: ModelConfig, tensors: Mapping[str, SafetensorsHeader]
) -> None:
    """Every tensor that the config asks for is there with its shape and dtype, and no other.

    Raises CheckpointError naming the file and the tensor.
    """
    check = TensorCheck(folder, config.tensor_prefix, tensors)
    for name, shape in vectors(config):
        check.tensor(name, shape, DENSE)
    for name, out_features, in_features in chain(trunk_linears(config), expert_linears(config)):
        check.linear(name, out_features, in_features)
    if len(check.seen) != len(tensors):
        name = next(name for name in tensors if name not in check.seen)
        raise surplus(tensors[name], config.tensor_prefix + name)


class TensorCheck:
    """Checks tensors of a table one by one; `seen` holds the names of those that were right."""

    def __init__(self, folder: Path, prefix: str, tensors: Mapping[str, SafetensorsHeader]) -> None:
        self.folder = folder
        self.prefix = prefix
        self.tensors = tensors
        self.seen: set[str] = set()

    def linear(self, name: str, out_features: int, in_features: int) -> None:
        """Check a linear layer, INT4 if its packed weight is there."""
        packed_name = f"{name}.weight_packed"
        file = self.tensors.get(packed_name)
        if file is None:
            self.tensor(f"{name}.weight", (out_features, in_features), DENSE)
            return
        if in_features % GROUP_SIZE:
            raise CheckpointError(
                f"{file.path}: {self.prefix}{packed_name}: {in_features} input features do not "
                f"divide into INT4 groups of {GROUP_SIZE}",
                "This engine reads INT4 weights in whole groups only.",
            )
        self.tensor(packed_name, (out_features, in_features // 8), ("I32",))
        self.tensor(f"{name}.weight_scale", (out_features, in_features // GROUP_SIZE), ("BF16",))
        shape_name = f"{name}.weight_shape"
        if shape_name in self.tensors:
            self.tensor(shape_name, (2,), ("I32", "I64"))

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        """Check one tensor: it is there, with this shape and one of these dtypes."""
        file = self.tensors.get(name)
        stored_name = self.prefix + name
        if file is None:
            raise CheckpointError(f"{self.folder}: tensor {stored_name} is missing", _INCOMPLETE)
        entry = file.entry(stored_name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{file.path}: {stored_name} has shape {list(entry.shape)}, "
                f"config.json asks for {list(shape)}",
                _MISMATCH,
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{file.path}: {stored_name} has dtype {entry.dtype}, "
                f"here only {' or '.join(dtypes)} can be read",
                "This engine reads bf16 and float32 weights, and INT4 experts; convert others.",
            )
        self.seen.add(name)


def surplus(file: SafetensorsHeader, stored_name: str) -> CheckpointError:
    """The error for a tensor that is not the model's."""
    return CheckpointError(
        f"{file.path}: {shown(stored_name)} is no tensor of the model that config.json describes",
        _MISMATCH,
    )
