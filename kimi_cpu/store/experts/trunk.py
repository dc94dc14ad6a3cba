"""The weights that every token passes: read into memory at once, and locked if that is allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kimi_cpu.errors import CheckpointError
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts import system
from kimi_cpu.store.experts.backends import MappedBackend
from kimi_cpu.store.extents import Extent, merged


class ResidentTrunk:
    """Brings the trunk into the page cache in the background, and keeps it there.

    It is populated, and locked, in the checkpoint's own maps, through which the kernels read it: in
    a second map of the same files its pages would be counted twice as resident. Where locking is
    not allowed they stay as long as the system likes, which the budget makes likely.

    Attributes:
        n_bytes: of the trunk without the embedding, of which a token reads one row.
        locked_bytes: how much is locked by now.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._extents = trunk_extents(checkpoint)
        self.n_bytes = sum(extent.length for extent in self._extents)
        self.locked_bytes = 0
        self._files = MappedBackend(checkpoint.mapped)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kimi-cpu-trunk", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when all of it has been read."""
        self._thread.join()

    def close(self) -> None:
        """Stop reading. Locks end with the checkpoint's maps."""
        self._stop.set()
        self._thread.join()
        self._files.close()

    def _work(self) -> None:
        files = self._files
        may_lock = system.lock_limit() >= self.n_bytes
        try:
            for extent in self._extents:
                for piece in files.pieces(0, [extent]):
                    if self._stop.is_set():
                        return
                    files.read(piece)
                if may_lock:
                    (view,) = files.buffers(0, [extent])
                    if system.lock(view.ctypes.data, view.nbytes):
                        self.locked_bytes += extent.length
                    else:
                        may_lock = False
        except (OSError, CheckpointError):
            pass  # whoever computes with these bytes meets the error where it can be told


def trunk_extents(checkpoint: Checkpoint) -> list[Extent]:
    """Where the trunk lies, without an embedding of its own."""
    skip = "" if checkpoint.config.tie_word_embeddings else "model.embed_tokens.weight"
    names: Iterable[str] = checkpoint.names()
    return merged(
        Extent(checkpoint.file_of(name), entry.begin, entry.nbytes)
        for name in names
        if ".mlp.experts." not in name and name != skip
        for entry in [checkpoint.entry(name)]
    )
