"""Where bytes lie: byte ranges of files, so that they can be read without a map."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Extent(NamedTuple):
    """The bytes [offset, offset + length) of the file `path`."""

    path: Path
    offset: int
    length: int


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The same bytes in the order in which they lie, ranges that touch each other joined."""
    result: list[Extent] = []
    for extent in sorted(extents):
        last = result[-1] if result else None
        if last and last.path == extent.path and last.offset + last.length == extent.offset:
            result[-1] = last._replace(length=last.length + extent.length)
        else:
            result.append(extent)
    return result
