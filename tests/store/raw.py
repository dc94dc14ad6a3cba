"""Files byte by byte, so that tests can write wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from kimi_cpu.errors import UserError
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.layout import expert_linears, trunk_linears, vectors


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    """Write header length, header (JSON or as given) and data."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def field(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def change_bytes(folder: Path, data: Any) -> None:
    """Change up to four bytes of one file, many of them near its beginning; data: `st.data()`."""
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from([len(content) - 1, min(len(content) - 1, 3000)]))
        content[data.draw(st.integers(0, near))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)


def read_or_refuse(folder: Path) -> None:
    """Everything reads as arrays of the config's shapes, or there is a UserError."""
    try:
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.config
        for name, shape in vectors(config):
            assert checkpoint.tensor(name).shape == shape
        for name, out_features, in_features in [*trunk_linears(config), *expert_linears(config)]:
            assert checkpoint.linear(name).shape == (out_features, in_features)
    except UserError as exc:
        assert str(folder) in exc.message and exc.message.isprintable()
