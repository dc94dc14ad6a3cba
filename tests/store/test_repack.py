"""Repacking: exact, the same bytes whatever happens on the way, and clear errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kimi_cpu.errors import CheckpointError, UsageError, UserError
from kimi_cpu.kernels import repacking
from kimi_cpu.quant import (
    Int4Weight,
    as_f32,
    dequantize,
    f32_to_bf16,
    pack,
    quantize_int4,
    quantize_int8,
)
from kimi_cpu.store.checkpoint import INDEX_NAME, MANIFEST_NAME, Checkpoint
from kimi_cpu.store.extents import Extent, merged
from kimi_cpu.store.manifest import load_manifest
from kimi_cpu.store.packed import PackedCheckpoint
from kimi_cpu.store.repack import Options, Plan, plan_repack, repack, verify
from kimi_cpu.store.repack import progress as progress_module
from kimi_cpu.store.repack import run as run_module
from kimi_cpu.store.repack.convert import round_rows
from kimi_cpu.store.repack.files import Files, Scratch, TensorReader
from kimi_cpu.store.repack.plan import ExpertJob, RowsJob, expert_tensors
from kimi_cpu.store.writer import int4_tensors
from tests.store.repacking import OPTIONS, contents, copy, fails
from tests.store.test_checkpoint import GATE, rewrite, shard_of
from tests.test_quant import blocks_by_definition
from tests.tiny import tiny_checkpoint

# The order.


def test_rounding_is_spread_among_what_is_only_packed(source: Path, tmp_path: Path) -> None:
    """Else the disk waits for the processors, then they for it."""
    layout = plan_repack(source, tmp_path / "p", OPTIONS).layout
    pieces = sorted(layout.pieces, key=lambda piece: isinstance(piece.job, ExpertJob))
    mixed = run_module._mixed(pieces)
    assert sorted(mixed) == sorted(pieces)
    slow = [i for i, p in enumerate(mixed) if isinstance(p.job, RowsJob) and p.job.how == "round8"]
    gaps = np.diff([-1, *slow, len(mixed)])
    assert len(slow) > 5 and gaps.max() <= -(-len(mixed) // len(slow)) + 1
    assert run_module._mixed([]) == []


def test_an_experts_neighbouring_tensors_are_read_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = plan_repack(source, tmp_path / "p", OPTIONS).layout
    job = ExpertJob(1, 3)
    names = expert_tensors(layout.source, job)
    ranges = merged(
        Extent(
            layout.source.file_of(n), layout.source.entry(n).begin, layout.source.entry(n).nbytes
        )
        for n in names
    )
    assert len(names) == 9 and len(ranges) < 6
    lengths: list[int] = []
    read = Files.read

    def counted(files: Files, path: Path, offset: int, length: int, scratch: Scratch) -> Any:
        lengths.append(length)
        return read(files, path, offset, length, scratch)

    monkeypatch.setattr(Files, "read", counted)
    reader = TensorReader(layout.source, Files(), Scratch(1 << 20))
    alone = {name: reader.rows(name, 1).copy() for name in names if "shape" not in name}
    lengths.clear()
    reader.load(names)
    for name, rows in alone.items():
        assert np.array_equal(reader.rows(name, 1), rows)
    assert sorted(lengths) == sorted(extent.length for extent in ranges)
    reader.clear()
    reader.rows(names[0])
    assert len(lengths) == len(ranges) + 1


# The arithmetic.


@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 64), (32, 128), (16, 96), (20, 64), (33, 32), (48, 7168), (400, 512)]
)
def test_fast_packing_is_what_quant_defines(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows * columns)
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    int4 = Int4Weight(packed, rng.integers(0, 1 << 16, (rows, columns // 32), dtype=np.uint16))
    right = blocks_by_definition(int4)
    out = np.full_like(right, 99)
    pack(int4, out)
    assert np.array_equal(out, right)
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    w[0, :32] = 0
    for bits, quantize in ((8, quantize_int8), (4, quantize_int4)):
        for dense in (w, f32_to_bf16(w)):
            quantized = quantize(as_f32(dense))
            right = blocks_by_definition(quantized)
            out = np.full_like(right, 99)
            deviation = round_rows(dense, bits, out)
            assert np.array_equal(out, right)
            error = dequantize(quantized).astype(np.float64) - as_f32(dense)
            assert np.isclose(deviation.error_squares, np.sum(error**2))
            assert np.isclose(deviation.squares, np.sum(as_f32(dense).astype(np.float64) ** 2))
            assert np.isclose(deviation.max_abs, np.abs(error).max())


@pytest.mark.parametrize("direct", [True, False])
def test_reading_and_writing_at_offsets(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        open_file = os.open

        def refuse(path: Path, flags: int, *rest: int) -> int:
            if flags & getattr(os, "O_DIRECT", 0):
                raise OSError(errno.EINVAL, "no such thing here")
            return open_file(path, flags, *rest)

        monkeypatch.setattr(os, "open", refuse)
    path = tmp_path / "file"
    path.touch()
    rng = np.random.default_rng(0)
    content = np.zeros(70_000, dtype=np.uint8)
    files, scratch = Files(write=True), Scratch(200_000)
    for offset, length in ((0, 8192), (8192, 100), (8292, 4096), (65536, 4096), (69_000, 1000)):
        data = scratch.take(length)
        data[:] = content[offset : offset + length] = rng.integers(0, 256, length)
        files.write(path, offset, data)
    assert path.read_bytes() == content.tobytes()
    for offset, length in ((0, 4096), (1, 4096), (4095, 2), (5000, 60_000), (69_999, 1)):
        scratch.clear()
        found = files.read(path, offset, length, scratch)
        assert found.tobytes() == content[offset : offset + length].tobytes()
    scratch.clear()
    with pytest.raises(CheckpointError, match="ends at byte 70000"):
        files.read(path, 69_999, 2, scratch)
    with pytest.raises(MemoryError):
        scratch.take(1 << 30)
    files.close()


# The whole.


def test_result(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    plan = plan_repack(source, tmp_path / "new" / "packed", OPTIONS)
    assert not (tmp_path / "new").exists()  # planning writes nothing
    seen: list[int] = []
    report = repack(plan, threads=3, on_bytes=seen.append)
    found = contents(report.target)
    assert found == expected
    assert sum(map(len, found.values())) - len(found[MANIFEST_NAME]) == plan.n_bytes
    assert [p.name for p in report.target.parent.iterdir()] == ["packed"]
    copied = {"config.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"}
    assert copied < set(found) and not {INDEX_NAME, ".hidden.json", "pytorch_model.bin"} & set(
        found
    )
    for name in copied:
        assert found[name] == (source / name).read_bytes()
    assert sum(seen) == sum(done.length for done in plan.progress.done.values())
    manifest = load_manifest(report.target)
    assert report.manifest == manifest
    assert [file.name for file in manifest.source] == sorted(
        path.name for path in source.glob("*.safetensors")
    )
    assert report.overall is not None and 0.003 < report.overall.relative_l2 < 0.008


def test_the_kernels_make_the_same_files(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    repack(plan_repack(source, tmp_path / "packed", OPTIONS), kernels=repacking)
    assert contents(tmp_path / "packed") == expected


@pytest.mark.parametrize("fits", [True, False])
def test_writes_begin_and_end_anywhere(tmp_path: Path, fits: bool) -> None:
    """Whole blocks go past the page cache, ends through it: neither spoils its neighbours."""
    path, rng = tmp_path / "file", np.random.default_rng(0)
    path.write_bytes(bytes(1 << 18))
    right, scratch, files = bytearray(1 << 18), Scratch(1 << 18), Files(write=True)
    for _ in range(200):
        offset, length = (int(n) for n in rng.integers(0, 1 << 17, 2))
        offset, length = (offset // 4096 * 4096, length) if rng.random() < 0.3 else (offset, length)
        scratch.clear()
        data = scratch.take(length, lead=(offset + (not fits)) % 4096)
        data[:] = rng.integers(0, 256, length, dtype=np.uint8)
        files.write(path, offset, data)
        right[offset : offset + length] = data.tobytes()
    files.close()
    assert path.read_bytes() == bytes(right)


def test_verify_proves_it_and_measures_rounding(source: Path, tmp_path: Path) -> None:
    for form, least, most in (("int8", 0.003, 0.008), ("int4", 0.05, 0.15), ("bf16", 0, 0)):
        target = tmp_path / form
        report = repack(plan_repack(source, target, Options(trunk=form)))
        found = verify(target, source, threads=2)
        assert found.n_experts == 2 * 16 and found.rounding == dict(report.manifest.rounding)
        assert found.overall == report.overall
        assert verify(target).n_chunks == found.n_chunks
        if form == "bf16":
            assert found.overall is None and not found.rounding
            continue
        for name, error in found.rounding.items():
            assert least < error.relative_l2 < most, name
            weight, was = Checkpoint.open(target).linear(name), Checkpoint.open(source).linear(name)
            difference = dequantize(weight) - dequantize(was)
            assert np.isclose(error.max_abs, np.abs(difference).max(), rtol=1e-3)
        # what is multiplied from both sides, or is no linear layer, stays as it is
        assert not [n for n in found.rounding if "kv_b" in n or "mlp.gate." in n or "embed" in n]


def test_int4_layers_of_the_trunk_stay_exact(tmp_path: Path) -> None:
    name, kv_b = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.kv_b_proj"

    def change(tensors: dict[str, Any]) -> None:
        for layer in (name, kv_b):
            dense = as_f32(tensors.pop(f"{layer}.weight")[1])
            tensors.update({t[0]: t for t in int4_tensors(layer, quantize_int4(dense))})

    source = rewrite(tmp_path / "a", change)
    report = repack(plan_repack(source, tmp_path / "b"))
    packed, published = Checkpoint.open(tmp_path / "b"), Checkpoint.open(source)
    for layer in (name, kv_b):
        assert np.array_equal(dequantize(packed.linear(layer)), dequantize(published.linear(layer)))
        assert layer not in report.manifest.rounding
    assert isinstance(packed.linear(kv_b), Int4Weight)
    verify(tmp_path / "b", source)


def test_float32_sources(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", rest="f32")
    repack(plan_repack(source, tmp_path / "b"))
    norm = Checkpoint.open(tmp_path / "b").tensor("model.norm.weight")
    assert norm.dtype == np.float32
    assert verify(tmp_path / "b", source).overall is not None


def test_many_small_pieces_give_the_same_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors cut into pieces of 16 rows: the weight files do not depend on it."""
    repack(plan_repack(source, tmp_path / "a"))
    monkeypatch.setattr("kimi_cpu.store.repack.plan.TRUNK_PIECE_BYTES", 1000)
    plan = plan_repack(source, tmp_path / "b")
    repack(plan)
    assert len(plan.layout.pieces) > 200
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {n: c for n, c in a.items() if n != MANIFEST_NAME} == {
        n: c for n, c in b.items() if n != MANIFEST_NAME
    }
    verify(tmp_path / "b", source)


# What is refused.


def test_experts_that_are_not_int4(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", int4=False)
    error = fails(CheckpointError, "is BF16, not INT4", lambda: plan_repack(source, tmp_path / "b"))
    assert "experts.0.gate_proj" in error.message


def test_sources_that_are_none(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "x"
    shutil.copy(source / "config.json", tmp_path)
    fails(CheckpointError, "neither model.safe", lambda: plan_repack(tmp_path, target))
    repack(plan_repack(source, tmp_path / "packed"))
    fails(CheckpointError, "is a packed checkpoint already", lambda: plan_repack(
        tmp_path / "packed", target
    ))  # fmt: skip
    broken = copy(source, tmp_path / "broken")
    shard_of(broken, "model.norm.weight").unlink()
    fails(CheckpointError, "cannot be read", lambda: plan_repack(broken, target))
    assert not target.exists() and not target.with_name("x.partial").exists()


def test_targets_that_are_there(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine", "utf-8")
    fails(UsageError, "is there already", lambda: plan_repack(source, file))
    fails(UsageError, "is there already and not empty", lambda: plan_repack(source, tmp_path))
    fails(UsageError, "is there already and not empty", lambda: plan_repack(source, source))
    other = tmp_path / "a.partial"
    other.mkdir()
    (other / "mine").touch()
    fails(UsageError, "is in the way", lambda: plan_repack(source, tmp_path / "a"))
    empty = tmp_path / "empty"
    empty.mkdir()
    repack(plan_repack(source, empty, OPTIONS))
    assert (empty / MANIFEST_NAME).exists()


def test_too_little_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "free_bytes", lambda path: 1000)
    plan = plan_repack(source, tmp_path / "a")
    assert plan.needed_bytes > plan.free_bytes == 1000
    fails(UserError, "needs 0.1 GB more on this disk, 0.0 GB are free", lambda: repack(plan))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        (f"{GATE}.weight_scale", 0x7FC0, "weight_scale holds NaN or infinity"),
        ("lm_head.weight", 0x7F80, "lm_head.weight holds NaN or infinity"),
        (f"{GATE}.weight_shape", 7, "weight_shape says"),
    ],
)
def test_damage_found_on_the_way(tmp_path: Path, name: str, row: int, problem: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name][1][-1] = row

    source = rewrite(tmp_path / "a", change)
    plan = plan_repack(source, tmp_path / "b")
    error = fails(CheckpointError, problem, lambda: repack(plan))
    assert str(shard_of(source, name)) in error.message
    assert not (tmp_path / "b").exists()


def test_another_process_is_at_it(source: Path, tmp_path: Path) -> None:
    plan = plan_repack(source, tmp_path / "a")
    plan.progress.begin({}, {})
    other = plan_repack(source, tmp_path / "b")
    lock = plan.progress
    other = Plan(**(other.__dict__ | {"progress": progress_module.Progress(tmp_path / "a")}))
    fails(UserError, "another kimi-cpu is writing here", lambda: repack(other))
    lock.close()


# Verifying.


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    return repack(plan_repack(source, tmp_path / "packed", OPTIONS)).target


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("name", ["experts-00001.kcpu", "trunk-00001.safetensors"])
def test_a_flipped_bit_is_found(source: Path, packed: Path, with_source: bool, name: str) -> None:
    path = packed / name
    content = bytearray(path.read_bytes())
    content[-1000 if name.startswith("trunk") else 8192 + 7] ^= 4
    path.write_bytes(content)
    error = fails(
        CheckpointError, "checksum", lambda: verify(packed, source if with_source else None)
    )
    assert str(path) in error.message
    if with_source and name.startswith("experts"):
        assert "expert 1 of layer 1" in error.message


def test_wrong_numbers_under_right_checksums(source: Path, packed: Path) -> None:
    import zlib

    checkpoint = Checkpoint.open(packed)
    assert isinstance(checkpoint, PackedCheckpoint)
    ((path, offset, length),) = checkpoint.expert_extents(1, 2)
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 1
    path.write_bytes(content)
    values = json.loads((packed / MANIFEST_NAME).read_text("utf-8"))
    crc32 = zlib.crc32(content[offset : offset + length])
    for file in values["experts"]["files"]:
        for chunk in file["chunks"]:
            if (file["name"], chunk[0]) == (path.name, offset):
                chunk[2] = f"{crc32:08x}"
    (packed / MANIFEST_NAME).write_text(json.dumps(values), "utf-8")
    verify(packed)
    fails(
        CheckpointError,
        "expert 2 of layer 1 is not what the source has",
        lambda: verify(packed, source),
    )


def test_verify_needs_the_right_folders(source: Path, packed: Path, tmp_path: Path) -> None:
    fails(CheckpointError, "is no packed checkpoint", lambda: verify(source))
    other = tiny_checkpoint(tmp_path / "other", seed=1, vocab_size=250)
    fails(
        CheckpointError, "is not what the packed checkpoint was made", lambda: verify(packed, other)
    )
    (packed / "chat_template.jinja").write_text("changed", "utf-8")
    fails(CheckpointError, "is not what was copied", lambda: verify(packed, source))
    (packed / "chat_template.jinja").unlink()
    fails(CheckpointError, "No such file", lambda: verify(packed))
