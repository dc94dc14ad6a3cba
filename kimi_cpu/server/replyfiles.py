"""Replies on disk, so that a server that starts again finds its own tokens in what clients send.

One file a reply, in the folder of its model beside the latents: what a prompt made of these tokens
has computed is worth nothing without them. Files appear and vanish whole, so processes that share a
folder need no lock.

    bytes 0-7     "KIMIRPL1"
    8-23          the model's key (`prefixes.identity`)
    24-55         the key of the conversation with the reply in it (`replay`)
    56-67         n, m and a CRC-32, little-endian: of bytes 0-63 and of all that follows
    then          n token ids of the turn, uint32, and the message as m bytes of JSON
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import secrets
import struct
import sys
import threading
import time
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

log = logging.getLogger(__name__)

#: What may lie in a folder, of all models; a reply of Kimi's whole context takes 2 MB.
MAX_FILES = 8192
MAX_BYTES = 64 << 20
#: Of a file; what claims more is damaged.
_MAX_FILE_BYTES = 16 << 20
#: Replies that wait to be written; what comes when there are more is not kept.
_MAX_WAITING = 256
#: After so many files the folder is measured again: other processes write into it, too.
_FILES_BETWEEN_SCANS = 64
#: Files that nobody has finished after this time never will be.
_STALE_S = 3600.0

_MAGIC = b"KIMIRPL1"
_HEADER = struct.Struct("<8s16s32sIII")
_CHECKED = _HEADER.size - 4
_FOLDER = "replies"
_OWN_FOLDER = re.compile(r"[0-9a-f]{32}")
_OWN_FILE = re.compile(r"[0-9a-f]{64}\.reply")
_OWN_TEMPORARY = re.compile(r"[0-9a-f]{32}\.part")


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    type: Literal["function"]
    function: _Function


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    """What `chat.generate.Result.message` may be."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[_Call] | msgspec.UnsetType = msgspec.UNSET


class _DamagedError(Exception):
    """The file is not what its name says; the message tells how."""


class ReplyFiles:
    """The replies of one model in a folder. Any thread may call any method.

    Args:
        root: of all models; made if it is not there, for this user alone, as token ids are text.
        model: the key of the model.
        n_vocab: every id is less.
    """

    def __init__(self, root: Path, model: bytes, n_vocab: int) -> None:
        self._root = root
        self._model = model
        self._n_vocab = n_vocab
        self._folder = root / model.hex() / _FOLDER
        self._queue: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue()
        self._complained = False
        self._since_scan = 0
        self._n_files = self._n_bytes = 0
        try:
            for folder in (root, root / model.hex(), self._folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._shrink()
        except OSError as error:
            self._complain(error)
        self._thread = threading.Thread(target=self._work, name="kimi-cpu-replies", daemon=True)
        self._thread.start()

    def save(self, key: bytes, message: Mapping[str, Any], turn: array[int]) -> None:
        """Write a reply, some time; not if too many are waiting."""
        if self._queue.qsize() < _MAX_WAITING:
            self._queue.put((key, self._packed(key, message, turn)))

    def load(self, key: bytes) -> tuple[dict[str, Any], array[int]] | None:
        """The message and the turn; None if there are none, with a warning if they are damaged."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            found = self._unpacked(key, data)
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("skipped %s: %s", path, error.strerror or error)
            return None
        except _DamagedError as error:
            log.warning("skipped %s: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return found

    def close(self, within_s: float = 2.0) -> None:
        """Write what waits, for so long."""
        self._queue.put(None)
        self._thread.join(within_s)

    def _packed(self, key: bytes, message: Mapping[str, Any], turn: array[int]) -> bytes:
        ids, text = _little_endian(turn).tobytes(), msgspec.json.encode(message)
        head = _HEADER.pack(_MAGIC, self._model, key, len(turn), len(text), 0)[:_CHECKED]
        check = zlib.crc32(text, zlib.crc32(ids, zlib.crc32(head)))
        return b"".join((head, check.to_bytes(4, "little"), ids, text))

    def _unpacked(self, key: bytes, data: bytes) -> tuple[dict[str, Any], array[int]]:
        if len(data) < _HEADER.size or not data.startswith(_MAGIC):
            raise _DamagedError("it does not begin as a file of a reply")
        _, model, own, n_ids, n_text, check = _HEADER.unpack_from(data)
        if (model, own) != (self._model, key):
            raise _DamagedError("it holds another reply than its name says")
        border = _HEADER.size + 4 * n_ids
        if len(data) != border + n_text:
            raise _DamagedError("it has not the size that it should have")
        if check != zlib.crc32(data[_HEADER.size :], zlib.crc32(data[:_CHECKED])):
            raise _DamagedError("its checksum is wrong")
        turn = array("I")
        turn.frombytes(data[_HEADER.size : border])
        turn = _little_endian(turn)
        if len(turn) and max(turn) >= self._n_vocab:
            raise _DamagedError("it has token ids that the model has not")
        try:
            message = msgspec.json.decode(data[border:], type=_Message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _DamagedError(f"its message is none ({error})") from None
        return msgspec.to_builtins(message), turn

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.reply"

    # What follows runs in the writing thread, but for the first look at the folder.

    def _work(self) -> None:
        while (waiting := self._queue.get()) is not None:
            try:
                self._write(*waiting)
            except OSError as error:
                self._complain(error)
            except Exception:
                log.exception("cannot keep replies in %s", self._folder)

    def _write(self, key: bytes, data: bytes) -> None:
        if len(data) > _MAX_FILE_BYTES:
            return
        temporary = self._folder / f"{secrets.token_hex(16)}.part"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            temporary.replace(self._path(key))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._complained = False
        self._n_files += 1
        self._n_bytes += len(data)
        self._since_scan += 1
        full = self._n_files > MAX_FILES or self._n_bytes > MAX_BYTES
        if full or self._since_scan >= _FILES_BETWEEN_SCANS:
            self._shrink()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time, size and path of the replies of any model; what was never finished is removed."""
        for folder in self._root.iterdir():
            if not _OWN_FOLDER.fullmatch(folder.name):
                continue
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder / _FOLDER):
                    with contextlib.suppress(OSError):  # gone meanwhile
                        status = entry.stat(follow_symlinks=False)
                        if _OWN_FILE.fullmatch(entry.name):
                            yield status.st_mtime, status.st_size, Path(entry.path)
                        old = time.time() - status.st_mtime > _STALE_S
                        if old and _OWN_TEMPORARY.fullmatch(entry.name):
                            Path(entry.path).unlink()

    def _shrink(self) -> None:
        """Measure the folder; remove what was not used for longest, a little more than needed."""
        files = sorted(self._files())
        n_files, n_bytes = len(files), sum(size for _, size, _ in files)
        if n_files > MAX_FILES or n_bytes > MAX_BYTES:
            for _, size, path in files:
                if n_files <= MAX_FILES * 0.95 and n_bytes <= MAX_BYTES * 0.95:
                    break
                path.unlink(missing_ok=True)
                n_files -= 1
                n_bytes -= size
        self._n_files, self._n_bytes, self._since_scan = n_files, n_bytes, 0

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            log.warning("cannot keep replies in %s: %s", self._folder, error.strerror or error)
        self._complained = True


def _little_endian(ids: array[int]) -> array[int]:
    """On machines that are not, the same with the bytes of each number turned."""
    if sys.byteorder == "little":
        return ids
    turned = ids[:]
    turned.byteswap()
    return turned
