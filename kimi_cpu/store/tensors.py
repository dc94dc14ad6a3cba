"""Tensors by name over several safetensors files, checked when first handed out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import F32, U16, Int4Weight
from kimi_cpu.store.safetensors import SafetensorsFile, TensorEntry

#: Dense tensors up to this size are searched for NaN and infinity when first handed out. Larger
#: ones are left to `find_non_finite`: reading 21 GB at start would cost what loading must not.
CHECK_BYTES = 1 << 20

_DAMAGED = "The file is damaged: download it again."


class Tensors:
    """A table of tensors; names are without K2.5's `language_model.` prefix.

    Args:
        files: which file holds a tensor.
        prefix: what precedes each name in the files.
    """

    def __init__(self, files: dict[str, SafetensorsFile], prefix: str = "") -> None:
        self._files = files
        self._prefix = prefix
        self._checked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def entry(self, name: str) -> TensorEntry:
        """dtype, shape and byte range within its file, without reading it."""
        return self._files[name].entry(self._prefix + name)

    def file_of(self, name: str) -> Path:
        """The file that holds it."""
        return self._files[name].path

    def raw(self, name: str) -> npt.NDArray[Any]:
        """The tensor as it is stored, unchecked: a read-only view."""
        return self._files[name].tensor(self._prefix + name)

    def dense(self, name: str) -> U16 | F32:
        """A dense tensor as a read-only view: uint16 bits for BF16, float32 for F32.

        Raises CheckpointError if it is small (`CHECK_BYTES`) and holds NaN or infinity.
        """
        array = cast("U16 | F32", self.raw(name))
        if array.nbytes <= CHECK_BYTES and name not in self._checked:
            self.check_finite(name, array)
            self._checked.add(name)
        return array

    def linear(self, name: str) -> U16 | F32 | Int4Weight:
        """The weight [out, in] of a linear layer: INT4 if there is `name.weight_packed`.

        Raises CheckpointError if INT4 scales are not finite or `name.weight_shape` disagrees.
        """
        packed_name = f"{name}.weight_packed"
        if packed_name not in self._files:
            return self.dense(f"{name}.weight")
        out_features, words = self.entry(packed_name).shape
        packed = self._files[packed_name].bytes_of(self._prefix + packed_name)
        scale = cast(U16, self.raw(f"{name}.weight_scale"))
        if name not in self._checked:
            self.check_finite(f"{name}.weight_scale", scale)
            self._check_weight_shape(f"{name}.weight_shape", (out_features, words * 8))
            self._checked.add(name)
        return Int4Weight(packed=packed.reshape(out_features, words * 4), scale=scale)

    def check_finite(self, name: str, array: npt.NDArray[Any]) -> None:
        """Raise CheckpointError naming file and tensor if `array`, read of it, is not finite."""
        if not is_finite(array):
            stored_name = self._prefix + name
            raise CheckpointError(
                f"{self.file_of(name)}: {stored_name} holds NaN or infinity", _DAMAGED
            )

    def _check_weight_shape(self, name: str, expected: tuple[int, int]) -> None:
        if name not in self._files:
            return
        found = tuple(int(n) for n in self.raw(name))
        if found != expected:
            raise CheckpointError(
                f"{self.file_of(name)}: {self._prefix}{name} says {list(found)}, "
                f"the packed weight is {list(expected)}",
                _DAMAGED,
            )


def is_finite(array: npt.NDArray[Any]) -> bool:
    """No NaN, no infinity. For bf16 bits by two maxima, without a temporary array."""
    if array.size == 0:
        return True
    if array.dtype == np.uint16:
        # Infinity and NaN are the largest bit patterns of either sign: seen as int16 those of
        # positive sign come out on top, seen as uint16 those of negative sign.
        return bool(array.view(np.int16).max() < 0x7F80 and array.max() < 0xFF80)
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
