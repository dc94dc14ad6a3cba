"""The safetensors reader: views of good files, one clear error for each kind of bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import f32_to_bf16
from kimi_cpu.store.safetensors import NUMPY_DTYPES, SafetensorsFile
from kimi_cpu.store.writer import NamedTensor, write_safetensors
from tests.store.raw import field, write_raw

TENSORS: list[NamedTensor] = [
    ("b", f32_to_bf16(np.linspace(-2, 2, 15, dtype=np.float32).reshape(3, 5)), "BF16"),
    ("f", np.arange(6, dtype=np.float32).reshape(2, 3), "F32"),
    ("i", np.arange(-4, 4, dtype=np.int32), "I32"),
    ("l", np.array([3, 5]), "I64"),
    ("empty", np.zeros((0, 4), np.float32), "F32"),
    ("scalar", np.array(1.5, np.float32), "F32"),
]


def good_file(folder: Path) -> Path:
    path = folder / "good.safetensors"
    write_safetensors(path, TENSORS)
    return path


def test_views_of_a_good_file(tmp_path: Path) -> None:
    file = SafetensorsFile(good_file(tmp_path))
    assert sorted(file.names()) == sorted(name for name, _, _ in TENSORS)
    for name, array, tag in TENSORS:
        read = file.tensor(name)
        assert read.dtype == NUMPY_DTYPES[tag] and np.array_equal(read, array)
        if array.size:
            assert read.flags.aligned and not read.flags.writeable and not read.flags.owndata
        assert file.nbytes(name) == array.nbytes == file.entry(name).nbytes
        assert file.bytes_of(name).tobytes() == array.tobytes()


def test_views_outlive_close(tmp_path: Path) -> None:
    file = SafetensorsFile(good_file(tmp_path))
    view = file.tensor("f")
    file.close()
    file.close()
    assert view.sum() == 15
    with pytest.raises(ValueError, match="is closed"):
        file.tensor("f")


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, [t for t in TENSORS if t[2] != "BF16"])
    read = load_file(path)
    for name, array, tag in TENSORS:
        if tag != "BF16":
            assert np.array_equal(read[name], array)


def test_we_read_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: array for name, array, tag in TENSORS if tag != "BF16"}
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    for name, array in tensors.items():
        assert np.array_equal(file.tensor(name), array)


def test_odd_offsets_are_copied_to_aligned_arrays(tmp_path: Path) -> None:
    f32 = np.array([1.5, -2.5], np.float32)
    bf16 = np.array([1, 2, 0x3F80], np.uint16)
    header = {
        "pad": field("U8", [1], 0, 1),
        "f": field("F32", [2], 1, 9),
        "b": field("BF16", [3], 9, 15),
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = b"\0" + f32.tobytes() + bf16.tobytes()
    file = SafetensorsFile(write_raw(tmp_path / "odd.safetensors", encoded, data))
    for name, expected in (("f", f32), ("b", bf16)):
        read = file.tensor(name)
        assert read.flags.aligned and not read.flags.writeable and np.array_equal(read, expected)


GOOD = field("F32", [2], 0, 8)
EIGHT = bytes(8)
BAD_HEADERS: list[tuple[str, Any, bytes, str]] = [
    ("empty header", b"", EIGHT, "header: not valid JSON"),
    ("no JSON", b"{", EIGHT, "header: not valid JSON"),
    ("no UTF-8", b"\xff\xff", EIGHT, "header: not valid JSON"),
    ("list", b"[]", EIGHT, "header: expected a JSON object, found list"),
    ("deep", b'{"x":' + b"[" * 50_000, EIGHT, "header: JSON is nested too deeply"),
    ("twice", b'{"x":{},"x":{}}', EIGHT, "header: key 'x' appears twice"),
    ("field twice", b'{"x":{"dtype":"F32","dtype":"F32"}}', EIGHT, "key 'dtype' appears twice"),
    ("NaN", b'{"x":NaN}', EIGHT, "NaN is not a JSON number"),
    ("no object", {"x": 3}, EIGHT, "x: expected exactly dtype, shape and data_offsets"),
    ("field missing", {"x": {"dtype": "F32", "shape": [2]}}, EIGHT, "x: expected exactly"),
    ("field surplus", {"x": GOOD | {"y": 1}}, EIGHT, "x: expected exactly"),
    ("dtype", {"x": field("F31", [2], 0, 8)}, EIGHT, "x: unknown dtype 'F31'"),
    ("dtype type", {"x": GOOD | {"dtype": ["F32"]}}, EIGHT, "x: unknown dtype"),
    ("sub-byte", {"x": field("F4", [2], 0, 1)}, b"\0", "x: unknown dtype 'F4'"),
    ("shape type", {"x": field("F32", "2", 0, 8)}, EIGHT, "x: shape is no list"),
    ("shape long", {"x": field("F32", [1] * 9, 0, 4)}, bytes(4), "x: shape is no list"),
    ("negative size", {"x": field("F32", [-2], 0, 8)}, EIGHT, "x: shape holds something else"),
    ("two negatives", {"x": field("F32", [-1, -2], 0, 8)}, EIGHT, "x: shape holds"),
    ("float size", {"x": field("F32", [2.0], 0, 8)}, EIGHT, "x: shape holds something else"),
    ("true size", {"x": field("F32", [True, 2], 0, 8)}, EIGHT, "x: shape holds"),
    ("huge size", {"x": field("F32", [1 << 60], 0, 8)}, EIGHT, "x: shape holds"),
    ("wraps", {"x": field("F32", [1 << 40, 1 << 22], 0, 0)}, b"", "x: F32 .* needs"),
    ("product", {"x": field("F32", [3], 0, 8)}, EIGHT, r"x: F32 \[3\] needs 12 bytes, .* give 8"),
    ("offset type", {"x": GOOD | {"data_offsets": 8}}, EIGHT, "x: data_offsets is no pair"),
    ("one offset", {"x": GOOD | {"data_offsets": [0]}}, EIGHT, "x: data_offsets is no pair"),
    ("negative", {"x": field("F32", [2], -8, 0)}, EIGHT, "x: data_offsets .-8, 0. are no byte"),
    ("reversed", {"x": field("F32", [2], 8, 0)}, EIGHT, "x: data_offsets .8, 0. are no byte"),
    ("float offset", {"x": field("F32", [2], 0.0, 8)}, EIGHT, "x: data_offsets"),
    ("huge", {"x": field("F32", [2], 1 << 70, (1 << 70) + 8)}, EIGHT, "x: data_offsets"),
    ("truncated", {"x": field("F32", [4], 0, 16)}, EIGHT, r"x ends at byte \d+, the file has"),
    ("overlap", {"x": GOOD, "y": field("F32", [1], 4, 8)}, EIGHT, "y overlaps x"),
    ("same bytes", {"x": GOOD, "y": GOOD}, EIGHT, "y overlaps x"),
    ("hole", {"x": GOOD, "y": field("F32", [1], 12, 16)}, bytes(16), "y leaves a hole after x"),
    ("first hole", {"x": field("F32", [1], 4, 8)}, EIGHT, "x leaves a hole after the header"),
    ("trailing", {"x": GOOD}, bytes(9), "1 bytes too many after x"),
    ("odd name", {"a\x1b\n": 3}, EIGHT, r"'a\\x1b\\n': expected exactly"),
]


@pytest.mark.parametrize(
    ("header", "data", "problem"), [b[1:] for b in BAD_HEADERS], ids=[b[0] for b in BAD_HEADERS]
)
def test_bad_header_is_one_clear_error(
    tmp_path: Path, header: Any, data: bytes, problem: str
) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=problem) as caught:
        SafetensorsFile(path)
    assert caught.value.message.startswith(str(path)) and caught.value.hint
    assert caught.value.message.isprintable()


def test_bad_lengths(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    for content, problem in (
        (b"", "only 0 bytes long"),
        (b"1234567", "only 7 bytes long"),
        ((100).to_bytes(8, "little") + b"{}", "header claims 100 bytes, the whole file has 10"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header claims 9223372036854775808 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"bad\.safetensors: {problem}"):
            SafetensorsFile(path)


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("none.safetensors", "folder.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name}: no such file"):
            SafetensorsFile(tmp_path / name)


def test_dtypes_that_cannot_be_computed_with_are_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"x": field("F16", [4], 0, 8)}, EIGHT)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: x has dtype F16"):
        SafetensorsFile(path).tensor("x")


def check_whatever(path: Path) -> None:
    """Opening and reading everything gives arrays within the file or a CheckpointError.

    What the format's own library refuses, we refuse as well.
    """
    try:
        file = SafetensorsFile(path)
    except CheckpointError as exc:
        assert exc.message.isprintable()
        return
    with safe_open(path, framework="numpy") as library:
        assert sorted(library.keys()) == sorted(file.names())
    size = path.stat().st_size
    for name in file.names():
        entry = file.entry(name)
        assert 8 <= entry.begin <= entry.end <= size
        try:
            array = file.tensor(name)
        except CheckpointError:
            continue
        assert (
            array.nbytes == entry.nbytes
            and array.tobytes() == path.read_bytes()[entry.begin : entry.end]
        )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_corrupt_bytes_never_escape(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = good_file(tmp_path_factory.getbasetemp())
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    positions = st.integers(0, header_end - 1) | st.sampled_from([0, 1, 7, 8])
    for position, value in data.draw(
        st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=4)
    ):
        content[position] = value
    del content[data.draw(st.integers(0, len(content)) | st.just(len(content))) :]
    path.write_bytes(content)
    check_whatever(path)


NUMBERS = st.integers(-3, 40) | st.sampled_from([1 << 31, 1 << 63, -(1 << 63), 1.0, True, None])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F16", "U8", "X", None]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | NUMBERS,
    }
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), ENTRIES | NUMBERS, max_size=3), st.binary(max_size=40))
def test_hostile_headers_never_escape(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    check_whatever(write_raw(path, header, data))
