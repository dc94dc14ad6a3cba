"""The file of one block: a header, the tokens' keys (`attention_form`), the latents.

    bytes 0-7     "KIMILAT1"
    8-23          the model's key (`identity`)
    24-39, 40-55  digests of the tokens before the block, and up to its end
    56-59         n, the number of tokens, little-endian as all numbers
    60-63         CRC-32 of bytes 0-59, of the keys and of the latents
    then          n keys, int32, and the latents as `Block.dump` gives them

A digest is BLAKE2b of the digest before it and the block's keys, so a name tells all tokens
up to the block's end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.kv_cache import Block
from kimi_cpu.quant import U8

MAGIC = b"KIMILAT1"
DIGEST_BYTES = 16
SUFFIX = ".latents"
_HEADER = struct.Struct("<8s16s16s16sII")


class DamagedFileError(Exception):
    """The file is not what its name says; the message tells how."""


class BlockName(NamedTuple):
    """A block's place among all token sequences.

    Attributes:
        parent, own: digests of the tokens before it, and up to its end.
        n_tokens: how many lie in it.
    """

    parent: bytes
    own: bytes
    n_tokens: int

    @classmethod
    def of(cls, parent: bytes, tokens: bytes) -> BlockName:
        """The block of these keys (int32) after those of `parent`."""
        own = hashlib.blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()
        return cls(parent, own, len(tokens) // 4)

    @classmethod
    def parse(cls, file_name: str) -> BlockName | None:
        """From a file's name; None if it is not one."""
        parts = file_name.removesuffix(SUFFIX).split("-")
        if not file_name.endswith(SUFFIX) or len(parts) != 3:
            return None
        try:
            name = cls(bytes.fromhex(parts[0]), bytes.fromhex(parts[1]), int(parts[2]))
        except ValueError:
            return None
        whole = len(name.parent) == len(name.own) == DIGEST_BYTES
        fits = whole and 0 < name.n_tokens <= BLOCK_TOKENS
        return name if fits and name.file_name == file_name else None

    @property
    def file_name(self) -> str:
        return f"{self.parent.hex()}-{self.own.hex()}-{self.n_tokens}{SUFFIX}"


def write_block(
    path: Path, temporary: Path, model: bytes, name: BlockName, tokens: bytes, latents: U8
) -> int:
    """Write a file beside `path` and put it in its place at once; its size. Raises OSError."""
    head = _HEADER.pack(MAGIC, model, name.parent, name.own, name.n_tokens, 0)
    check = zlib.crc32(latents.data, zlib.crc32(tokens, zlib.crc32(head[:60])))
    head = _HEADER.pack(MAGIC, model, name.parent, name.own, name.n_tokens, check)
    try:
        with temporary.open("xb", buffering=0) as file:
            for part in (head, tokens, latents.data):
                _write_all(file, part)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return len(head) + len(tokens) + latents.nbytes


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def _opened(path: Path, model: bytes, name: BlockName) -> Iterator[tuple[FileIO, bytes, bytes]]:
    """An open file, its header and keys, both as they should be."""
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEADER.size) or b""
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise DamagedFileError("it does not begin as a file of latents")
        _, *found, _ = _HEADER.unpack(head)
        if found != [model, name.parent, name.own, name.n_tokens]:
            raise DamagedFileError("it holds other latents than its name says")
        tokens = file.read(4 * name.n_tokens) or b""
        if BlockName.of(name.parent, tokens) != name:
            raise DamagedFileError("its tokens are damaged")
        yield file, head, tokens


def read_tokens(path: Path, model: bytes, name: BlockName) -> bytes:
    """A block's keys. Raises OSError and DamagedFileError."""
    with _opened(path, model, name) as (_, _, tokens):
        return tokens


def read_block(path: Path, model: bytes, name: BlockName, block: Block) -> None:
    """Fill a block. Raises OSError, and DamagedFileError, after which its content is undefined."""
    with _opened(path, model, name) as (file, head, tokens):
        whole = name.n_tokens == BLOCK_TOKENS
        pool = block.pool
        n_bytes = pool.layers * name.n_tokens * pool.row_bytes
        data = block.memory if whole else np.empty(n_bytes, dtype=np.uint8)
        if os.fstat(file.fileno()).st_size != len(head) + len(tokens) + n_bytes:
            raise DamagedFileError("it has not the size that it should have")
        view = data.data
        while view:
            count = file.readinto(view)
            if not count:
                raise DamagedFileError("it has become shorter")
            view = view[count:]
    check = zlib.crc32(data.data, zlib.crc32(tokens, zlib.crc32(head[:60])))
    if check != _HEADER.unpack(head)[-1]:
        raise DamagedFileError("its checksum is wrong")
    if not whole:
        block.fill(data, name.n_tokens)
