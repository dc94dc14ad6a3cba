"""`kimi-cpu.json`, the manifest of a packed checkpoint (docs/format.md): written and read strictly.

What it says about sizes is believed only as far as the files and the config agree: see `packed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kimi_cpu.config.reader import load_json_object, short
from kimi_cpu.errors import CheckpointError
from kimi_cpu.store.checkpoint import MANIFEST_NAME
from kimi_cpu.store.records import ALIGNMENTS

FORMAT = "kimi-cpu packed checkpoint"
VERSION = 1

#: What linear layers of the trunk may be stored as; bf16 means as they were published.
TRUNK_FORMS = ("int8", "bf16", "int4")

_MAX_BYTES = 256 << 20
_HINT = "The manifest is damaged: repack the checkpoint again."
_CHUNK_LINES = re.compile(r'\[\s+(\d+),\s+(\d+),\s+("[0-9a-f]{8}")\s+\]')
_CRC = re.compile("[0-9a-f]{8}")
_SHA256 = re.compile("[0-9a-f]{64}")

Item = TypeVar("Item")


class Chunk(NamedTuple):
    """The bytes [offset, offset + length) of a file, and their CRC-32 (zlib's)."""

    offset: int
    length: int
    crc32: int


class WeightFile(NamedTuple):
    """A weight file; bytes outside its chunks are zero."""

    name: str
    n_bytes: int
    chunks: tuple[Chunk, ...]


class CopiedFile(NamedTuple):
    """A file that was copied from the source as it is: config, tokenizer, template."""

    name: str
    n_bytes: int
    crc32: int


class SourceFile(NamedTuple):
    """A shard of the published checkpoint: its header's SHA-256 identifies it."""

    name: str
    n_bytes: int
    header_sha256: str


class Rounding(NamedTuple):
    """How far a rounded tensor is from its source: |w - w'| / |w| in L2, and max |w - w'|."""

    relative_l2: float
    max_abs: float


@dataclass(frozen=True)
class Manifest:
    """What a packed checkpoint is made of and from.

    Attributes:
        source: the shards it was made from.
        trunk_form: one of TRUNK_FORMS.
        align: what expert records are aligned to, in bytes.
        file_bytes: what weight files were cut at, about.
        records_per_file: experts a file.
        expert_files, trunk_files: the weights, in order.
        copied: everything else.
        rounding: of each trunk tensor that was rounded, by its layer's name.
    """

    source: tuple[SourceFile, ...]
    trunk_form: str
    align: int
    file_bytes: int
    records_per_file: int
    expert_files: tuple[WeightFile, ...]
    trunk_files: tuple[WeightFile, ...]
    copied: tuple[CopiedFile, ...]
    rounding: Mapping[str, Rounding]

    def dumps(self) -> str:
        """The file's text: it depends on the attributes alone."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "file_bytes": self.file_bytes,
            "source": [
                {"name": f.name, "bytes": f.n_bytes, "header_sha256": f.header_sha256}
                for f in self.source
            ],
            "experts": {
                "align": self.align,
                "records_per_file": self.records_per_file,
                "files": [_file_values(file) for file in self.expert_files],
            },
            "trunk": {
                "form": self.trunk_form,
                "files": [_file_values(file) for file in self.trunk_files],
                "rounding": {
                    name: {"relative_l2": error.relative_l2, "max_abs": error.max_abs}
                    for name, error in sorted(self.rounding.items())
                },
            },
            "copied": [
                {"name": f.name, "bytes": f.n_bytes, "crc32": f"{f.crc32:08x}"} for f in self.copied
            ],
        }
        text = json.dumps(values, indent=1) + "\n"
        return _CHUNK_LINES.sub(r"[\1, \2, \3]", text)  # a line a chunk instead of five


def _file_values(file: WeightFile) -> dict[str, Any]:
    chunks = [[chunk.offset, chunk.length, f"{chunk.crc32:08x}"] for chunk in file.chunks]
    return {"name": file.name, "bytes": file.n_bytes, "chunks": chunks}


def load_manifest(folder: Path) -> Manifest:
    """Read `kimi-cpu.json`. Raises CheckpointError naming the file and what is wrong with it.

    Guaranteed afterwards: names are plain and of the right kind, no name appears twice, numbers
    are in range, chunks are in order and within their file.
    """
    path = folder / MANIFEST_NAME
    values = load_json_object(path, CheckpointError, _HINT, _MAX_BYTES)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {short(values.get('format'))}", _HINT)
    if type(values.get("version")) is not int or values["version"] != VERSION:
        raise CheckpointError(
            f"{path}: version {short(values.get('version'))}, this program reads {VERSION}",
            "Update kimi-cpu, or repack the checkpoint with this version.",
        )
    try:
        manifest = _read(values)
    except ValueError as exc:
        raise CheckpointError(f"{path}: {exc}", _HINT) from None
    return manifest


def _read(values: dict[str, Any]) -> Manifest:
    _keys(values, "the manifest", "format version file_bytes source experts trunk copied")
    experts = _keys(values["experts"], "experts", "align records_per_file files")
    trunk = _keys(values["trunk"], "trunk", "form files rounding")
    align = experts["align"]
    if type(align) is not int or align not in ALIGNMENTS:
        raise ValueError(f"experts.align {short(align)} is not one of {list(ALIGNMENTS)}")
    if trunk["form"] not in TRUNK_FORMS:
        raise ValueError(f"trunk.form {short(trunk['form'])} is not one of {list(TRUNK_FORMS)}")
    if type(trunk["rounding"]) is not dict:
        raise ValueError("trunk.rounding is no object")
    manifest = Manifest(
        source=_list(values["source"], "source", _source_file),
        trunk_form=trunk["form"],
        align=align,
        file_bytes=_number(values["file_bytes"], "file_bytes", low=1),
        records_per_file=_number(experts["records_per_file"], "records_per_file", low=1),
        expert_files=_list(
            experts["files"], "experts.files", lambda v: _weight_file(v, r"experts-\d{5}\.kcpu")
        ),
        trunk_files=_list(
            trunk["files"], "trunk.files", lambda v: _weight_file(v, r"trunk-\d{5}\.safetensors")
        ),
        copied=_list(values["copied"], "copied", _copied_file),
        rounding={name: _rounding(name, v) for name, v in trunk["rounding"].items()},
    )
    names = [file.name for file in (*manifest.expert_files, *manifest.trunk_files)]
    names += [file.name for file in manifest.copied]
    if len(set(names)) != len(names):
        raise ValueError("a file is listed twice")
    return manifest


def _keys(value: Any, what: str, names: str) -> dict[str, Any]:
    if type(value) is not dict or value.keys() != set(names.split()):
        raise ValueError(f"{what} is no object of {names.replace(' ', ', ')}")
    return value


def _list(value: Any, what: str, read: Callable[[Any], Item]) -> tuple[Item, ...]:
    if type(value) is not list:
        raise ValueError(f"{what} is no list")
    return tuple(read(item) for item in value)


def _number(value: Any, what: str, low: int = 0) -> int:
    if type(value) is not int or not low <= value < 1 << 62:
        raise ValueError(f"{what} {short(value)} is out of range")
    return value


def _digits(value: Any, what: str, pattern: re.Pattern[str]) -> str:
    if type(value) is not str or not pattern.fullmatch(value):
        raise ValueError(f"{what} {short(value)} is no checksum")
    return value


def plain_name(value: Any) -> str:
    """A name of a file right beside the manifest; ValueError for anything that leads elsewhere."""
    plain = type(value) is str and value.isprintable() and not set(value) & set("/\\:")
    if not plain or value.startswith(".") or len(value) > 200:
        raise ValueError(f"{ascii(value)[:100]} is no plain file name")
    return str(value)


def _weight_file(value: Any, pattern: str) -> WeightFile:
    _keys(value, "a weight file", "name bytes chunks")
    name = value["name"]
    if type(name) is not str or not re.fullmatch(pattern, name, re.ASCII):
        raise ValueError(f"{ascii(name)[:100]} is no name of such a file")
    n_bytes = _number(value["bytes"], f"{name}: bytes", low=1)
    chunks = _list(value["chunks"], f"{name}: chunks", lambda v: _chunk(v, name))
    for before, chunk in pairwise((Chunk(0, 0, 0), *chunks)):
        if chunk.offset < before.offset + before.length:
            raise ValueError(f"{name}: chunks are out of order at byte {chunk.offset}")
    if not chunks or chunks[-1].offset + chunks[-1].length > n_bytes:
        raise ValueError(f"{name}: chunks do not fit its {n_bytes} bytes")
    return WeightFile(name, n_bytes, chunks)


def _chunk(value: Any, name: str) -> Chunk:
    if type(value) is not list or len(value) != 3:
        raise ValueError(f"{name}: a chunk is no [offset, length, checksum]")
    offset, length = (_number(n, f"{name}: chunk at") for n in value[:2])
    return Chunk(offset, length, int(_digits(value[2], name, _CRC), 16))


def _copied_file(value: Any) -> CopiedFile:
    _keys(value, "a copied file", "name bytes crc32")
    name = plain_name(value["name"])
    crc32 = int(_digits(value["crc32"], name, _CRC), 16)
    return CopiedFile(name, _number(value["bytes"], f"{name}: bytes"), crc32)


def _source_file(value: Any) -> SourceFile:
    _keys(value, "a source file", "name bytes header_sha256")
    name = plain_name(value["name"])
    digest = _digits(value["header_sha256"], name, _SHA256)
    return SourceFile(name, _number(value["bytes"], f"{name}: bytes"), digest)


def _rounding(name: str, value: Any) -> Rounding:
    _keys(value, f"rounding of {ascii(name)[:100]}", "relative_l2 max_abs")
    numbers = value["relative_l2"], value["max_abs"]
    if not all(type(n) in (int, float) and 0 <= n < 1e30 for n in numbers):
        raise ValueError(f"rounding of {ascii(name)[:100]} is out of range")
    return Rounding(*map(float, numbers))
