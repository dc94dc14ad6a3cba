"""What the tests of repacking share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_cpu.errors import UserError
from kimi_cpu.store.repack import Options

#: Several files of each kind from a tiny checkpoint.
OPTIONS = Options(file_bytes=50_000)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, below it too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def fails(error: type[UserError], problem: str, call: Callable[[], object]) -> UserError:
    with pytest.raises(error, match=problem) as caught:
        call()
    assert caught.value.hint and caught.value.message.isprintable()
    return caught.value
