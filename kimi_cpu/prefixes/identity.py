"""Which latents are interchangeable: those of the same weights, arithmetic and version."""

from __future__ import annotations

import hashlib

from kimi_cpu import __version__
from kimi_cpu.engine import Engine
from kimi_cpu.store.checkpoint import MANIFEST_NAME

#: Changes whenever latents of equal tokens do, or the format of their files.
FORMAT = 2


def model_key(engine: Engine) -> bytes:
    """16 bytes that name an engine's latents.

    A packed checkpoint is known by its manifest, which has the checksums of all weights; one as
    published by the names, sizes and times of its files.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = [str(FORMAT), __version__, engine.precision, engine.kernels_name]
    digest.update("\n".join(parts).encode())
    folder = engine.folder
    names = ["config.json"]
    if (folder / MANIFEST_NAME).exists():
        names.append(MANIFEST_NAME)
    else:
        for path in sorted(folder.glob("*.safetensors")):
            status = path.stat()
            digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    for name in names:
        digest.update(b"\n" + (folder / name).read_bytes())
    return digest.digest()
