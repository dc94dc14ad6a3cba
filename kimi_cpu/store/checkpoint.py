"""A Hugging Face checkpoint folder, read in place: every tensor is a view on a mapped file.

`Checkpoint.open` reads and checks the headers of all shards against the index and the config,
and touches no weight. What only the data can tell (a NaN among the scales, a `weight_shape` that
disagrees) is checked when a tensor is first handed out, so that only what is read costs time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from kimi_cpu.config import ModelConfig, load_json_object
from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import F32, GROUP_SIZE, U16, Int4Weight, Weight
from kimi_cpu.store.layout import PROJECTIONS, expert_linears, trunk_linears, vectors
from kimi_cpu.store.safetensors import SafetensorsFile, TensorEntry

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: Dense tensors up to this size are searched for NaN and infinity when first handed out. Larger
#: ones are left to `non_finite()`, since reading 21 GB at start would cost what loading must not.
CHECK_BYTES = 1 << 20

_MAX_INDEX_BYTES = 256 << 20
_INCOMPLETE = "The download is incomplete or mixed from two models: fetch the checkpoint again."
_MISMATCH = "config.json and the weights belong to different models, or the file is damaged."
_SKIPPED_PREFIXES = ("vision_tower.", "mm_projector.")


class _Place(NamedTuple):
    file: SafetensorsFile
    stored_name: str
    entry: TensorEntry


class Checkpoint:
    """An open checkpoint. Names are without K2.5's `language_model.` prefix.

    Attributes:
        folder: where it lies.
        config: its ModelConfig.
        total_bytes: bytes of all tensors of the language model.
        expert_bytes: those of the routed experts.
        trunk_bytes: the rest, which every token reads (embedding included).
    """

    def __init__(
        self, folder: Path, config: ModelConfig, files: list[SafetensorsFile],
        places: dict[str, _Place],
    ) -> None:  # fmt: skip
        """Use `Checkpoint.open`."""
        self.folder = folder
        self.config = config
        self._files = files
        self._places = places
        self._checked: set[str] = set()
        self.total_bytes = sum(p.entry.end - p.entry.begin for p in places.values())
        self.expert_bytes = sum(
            p.entry.end - p.entry.begin for name, p in places.items() if ".mlp.experts." in name
        )
        self.trunk_bytes = self.total_bytes - self.expert_bytes

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open and validate a checkpoint folder.

        Raises ConfigError or CheckpointError naming the file and the key or tensor.
        """
        folder = Path(folder)
        config = ModelConfig.load(folder)
        files, stored = _open_shards(folder)
        try:
            places = _select(config, stored)
            _check_against_config(folder, config, places)
        except BaseException:
            for file in files:
                file.close()
            raise
        return cls(folder, config, files, places)

    def names(self) -> Iterator[str]:
        """Names of all tensors of the language model."""
        return iter(self._places)

    def tensor(self, name: str) -> U16 | F32:
        """A dense tensor as a read-only view: uint16 bits for BF16, float32 for F32."""
        place = self._places[name]
        array = cast("U16 | F32", place.file.tensor(place.stored_name))
        if array.nbytes <= CHECK_BYTES and name not in self._checked:
            _check_finite(array, place)
            self._checked.add(name)
        return array

    def linear(self, name: str) -> Weight:
        """The weight [out, in] of the linear layer `name`, e.g. "model.layers.0.mlp.up_proj".

        INT4 if the checkpoint has `name.weight_packed`, else bf16 bits or float32. A tied
        "lm_head" is the embedding.
        """
        if name == "lm_head" and self.config.tie_word_embeddings:
            return self.tensor("model.embed_tokens.weight")
        packed = self._places.get(f"{name}.weight_packed")
        if packed is None:
            return self.tensor(f"{name}.weight")
        out_features, words = packed.entry.shape
        data = packed.file.bytes_of(packed.stored_name).reshape(out_features, words * 4)
        scale_place = self._places[f"{name}.weight_scale"]
        scale = cast(U16, scale_place.file.tensor(scale_place.stored_name))
        if name not in self._checked:
            _check_finite(scale, scale_place)
            self._check_weight_shape(name, (out_features, words * 8))
            self._checked.add(name)
        return Int4Weight(packed=data, scale=scale)

    def expert(self, layer: int, expert: int) -> tuple[Weight, Weight, Weight]:
        """(gate, up, down) of one routed expert: [I, D], [I, D], [D, I]."""
        base = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (self.linear(f"{base}.{projection}") for projection in PROJECTIONS)
        return gate, up, down

    def non_finite(self, names: Iterator[str] | None = None) -> str | None:
        """Search tensors (all dense ones by default) for NaN or infinity, reading them whole.

        Returns "FILE: NAME" of the first with one, or None. Use it to name the culprit after
        logits came out non-finite.
        """
        for name in self._places if names is None else names:
            place = self._places[name]
            if place.entry.dtype not in ("BF16", "F32"):
                continue
            if not _is_finite(place.file.tensor(place.stored_name)):
                return f"{place.file.path}: {place.stored_name}"
        return None

    def close(self) -> None:
        """Close the files; arrays already handed out stay valid."""
        for file in self._files:
            file.close()

    def _check_weight_shape(self, name: str, expected: tuple[int, int]) -> None:
        place = self._places.get(f"{name}.weight_shape")
        if place is None:
            return
        found = tuple(int(n) for n in place.file.tensor(place.stored_name))
        if found != expected:
            raise CheckpointError(
                f"{place.file.path}: {place.stored_name} says {list(found)}, "
                f"the packed weight is {list(expected)}",
                _MISMATCH,
            )


def _is_finite(array: npt.NDArray[Any]) -> bool:
    """No NaN, no infinity. For bf16 bits by two maxima, without a temporary array."""
    if array.size == 0:
        return True
    if array.dtype == np.uint16:
        # As signed numbers the non-negative values sort in order, as unsigned ones the negative.
        return bool(array.view(np.int16).max() < 0x7F80 and array.max() < 0xFF80)
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _check_finite(array: npt.NDArray[Any], place: _Place) -> None:
    if not _is_finite(array):
        raise CheckpointError(
            f"{place.file.path}: {place.stored_name} holds NaN or infinity",
            "The file is damaged: download it again.",
        )


def _open_shards(folder: Path) -> tuple[list[SafetensorsFile], dict[str, _Place]]:
    """Open every shard; returns the files and stored name -> place."""
    index_path = folder / INDEX_NAME
    if index_path.exists():
        weight_map = _read_index(index_path)
    elif (folder / SINGLE_NAME).exists():
        weight_map = None
    else:
        raise CheckpointError(
            f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is here",
            "Give the folder of a Hugging Face checkpoint in safetensors format.",
        )
    shard_names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
    files: list[SafetensorsFile] = []
    stored: dict[str, _Place] = {}
    try:
        for shard_name in shard_names:
            file = SafetensorsFile(folder / shard_name)
            files.append(file)
            for name, entry in file.entries.items():
                if weight_map is not None and weight_map.get(name) != shard_name:
                    raise _misplaced(file.path, name, weight_map.get(name))
                stored[name] = _Place(file, name, entry)
        if weight_map is not None and len(stored) != len(weight_map):
            name = next(name for name in weight_map if name not in stored)
            raise CheckpointError(f"{folder / weight_map[name]}: {name} is missing", _INCOMPLETE)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files, stored


def _misplaced(path: Path, name: str, expected: str | None) -> CheckpointError:
    where = "is not in the index" if expected is None else f"belongs into {expected} by the index"
    return CheckpointError(f"{path}: {name} {where}", _INCOMPLETE)


def _read_index(path: Path) -> dict[str, str]:
    hint = "The index is damaged: download it again."
    weight_map = load_json_object(path, CheckpointError, hint, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty", hint)
    for shard_name in set(map(str, weight_map.values())):
        # A plain file name only: an index must not make us open files elsewhere.
        plain = shard_name == Path(shard_name).name and "\\" not in shard_name
        if not plain or "\0" in shard_name or not shard_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {shard_name[:200]!r} is no name of a .safetensors file in this folder",
                hint,
            )
    if not all(type(shard_name) is str for shard_name in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map holds something else than file names", hint)
    return cast("dict[str, str]", weight_map)


def _select(config: ModelConfig, stored: dict[str, _Place]) -> dict[str, _Place]:
    """The language model's tensors under their names without prefix; the rest is skipped."""
    prefix = config.tensor_prefix
    extra_layers = tuple(
        f"model.layers.{config.num_hidden_layers + i}."
        for i in range(config.num_nextn_predict_layers)
    )
    places: dict[str, _Place] = {}
    for stored_name, place in stored.items():
        name = stored_name
        if prefix:
            if name.startswith(_SKIPPED_PREFIXES):
                continue
            if not name.startswith(prefix):
                raise _surplus(place)
            name = name[len(prefix) :]
        if name.endswith(".rotary_emb.inv_freq"):
            continue  # a buffer old versions saved; it follows from the config
        if extra_layers and name.startswith(extra_layers):
            continue  # multi-token prediction, which plain decoding does not use
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        places[name] = place
    return places


def _surplus(place: _Place) -> CheckpointError:
    return CheckpointError(
        f"{place.file.path}: {place.stored_name} is no tensor of the model that config.json "
        "describes",
        _MISMATCH,
    )


def _check_against_config(folder: Path, config: ModelConfig, places: dict[str, _Place]) -> None:
    """Every tensor the config asks for is there with its shape and dtype, and no other."""
    used = 0
    for name, shape in vectors(config):
        _check_entry(folder, config, name, places.get(name), shape, ("BF16", "F32"))
        used += 1
    for linears in (trunk_linears(config), expert_linears(config)):
        for name, out_features, in_features in linears:
            packed = places.get(f"{name}.weight_packed")
            if packed is None:
                weight_name = f"{name}.weight"
                _check_entry(
                    folder, config, weight_name, places.get(weight_name),
                    (out_features, in_features), ("BF16", "F32"),
                )  # fmt: skip
                used += 1
            else:
                used += _check_packed(folder, config, name, places, out_features, in_features)
    if used != len(places):
        raise _surplus(places[_first_surplus(config, places)])


def _check_packed(
    folder: Path, config: ModelConfig, name: str, places: dict[str, _Place],
    out_features: int, in_features: int,
) -> int:  # fmt: skip
    """Check the tensors of one INT4 projection; returns how many there are."""
    packed = places[f"{name}.weight_packed"]
    if in_features % GROUP_SIZE:
        raise CheckpointError(
            f"{packed.file.path}: {packed.stored_name}: {in_features} input features do not "
            f"divide into INT4 groups of {GROUP_SIZE}",
            _MISMATCH,
        )
    _check_entry(
        folder, config, f"{name}.weight_packed", packed, (out_features, in_features // 8), ("I32",)
    )
    scale_name = f"{name}.weight_scale"
    _check_entry(
        folder, config, scale_name, places.get(scale_name),
        (out_features, in_features // GROUP_SIZE), ("BF16",),
    )  # fmt: skip
    shape_name = f"{name}.weight_shape"
    shape = places.get(shape_name)
    if shape is None:
        return 2
    _check_entry(folder, config, shape_name, shape, (2,), ("I32", "I64"))
    return 3


def _check_entry(
    folder: Path, config: ModelConfig, name: str, place: _Place | None,
    shape: tuple[int, ...], dtypes: tuple[str, ...],
) -> None:  # fmt: skip
    if place is None:
        raise CheckpointError(
            f"{folder}: tensor {config.tensor_prefix}{name} is missing", _INCOMPLETE
        )
    if place.entry.shape != shape:
        raise CheckpointError(
            f"{place.file.path}: {place.stored_name} has shape {list(place.entry.shape)}, "
            f"config.json asks for {list(shape)}",
            _MISMATCH,
        )
    if place.entry.dtype not in dtypes:
        raise CheckpointError(
            f"{place.file.path}: {place.stored_name} has dtype {place.entry.dtype}, "
            f"only {' and '.join(dtypes)} can be read here",
            "This engine reads bf16 and float32 weights, and INT4 experts.",
        )


def _first_surplus(config: ModelConfig, places: dict[str, _Place]) -> str:
    known = {name for name, _ in vectors(config)}
    for linears in (trunk_linears(config), expert_linears(config)):
        for name, _, _ in linears:
            if f"{name}.weight_packed" in places:
                known |= {f"{name}.weight_{part}" for part in ("packed", "scale", "shape")}
            else:
                known.add(f"{name}.weight")
    return next(name for name in places if name not in known)
