"""Safetensors files byte by byte, so that tests can write wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
