"""Packed checkpoints: good ones are read in place, each kind of bad one gives one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.engine import Engine
from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import (
    Int4Weight,
    PackedWeight,
    as_f32,
    dequantize,
    pack,
    quantize_int4,
    quantize_int8,
    unpack,
)
from kimi_cpu.store.checkpoint import MANIFEST_NAME, Checkpoint
from kimi_cpu.store.layout import expert_linears, trunk_linears, vectors
from kimi_cpu.store.packed import BLOCKS, PackedCheckpoint, scales
from kimi_cpu.store.repack import Options, plan_repack, repack
from kimi_cpu.store.summary import summarise
from tests.store.raw import change_bytes, read_or_refuse, read_raw, write_raw
from tests.store.test_checkpoint import fails, rewrite
from tests.test_config import wrap
from tests.tiny import tiny_checkpoint, tiny_config

EXPERT = "model.layers.1.mlp.experts.3"
KV_B = "model.layers.0.self_attn.kv_b_proj"
SHARED = "model.layers.1.mlp.shared_experts.up_proj"


def packed(source: Path, target: Path, **options: Any) -> Path:
    return repack(plan_repack(source, target, Options(**options))).target


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), seed=3)


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of several files of each kind."""
    return packed(source, tmp_path_factory.mktemp("packed") / "good", file_bytes=40_000)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.mark.parametrize("form", ["int8", "bf16", "int4"])
@pytest.mark.parametrize("align", [4096, 65536])
@pytest.mark.parametrize("inner", [32, 64])
def test_reads_what_was_published(tmp_path: Path, form: str, align: int, inner: int) -> None:
    published_folder = tiny_checkpoint(tmp_path / "source", 5, moe_intermediate_size=inner)
    target = packed(published_folder, tmp_path / "packed", trunk=form, align=align)
    published, checkpoint = Checkpoint.open(published_folder), Checkpoint.open(target)
    assert isinstance(checkpoint, PackedCheckpoint)
    config = checkpoint.config
    for name, _ in vectors(config):
        assert np.array_equal(checkpoint.tensor(name), published.tensor(name))
    for name, out_features, in_features in expert_linears(config):
        weight, was = checkpoint.linear(name), published.linear(name)
        assert isinstance(weight, PackedWeight) and isinstance(was, Int4Weight)
        assert weight.shape == (out_features, in_features) and weight.bits == 4
        natural = unpack(weight)
        assert isinstance(natural, Int4Weight)
        assert natural.packed.tobytes() == was.packed.tobytes()
        assert natural.scale.tobytes() == was.scale.tobytes()
    for name, out_features, in_features in trunk_linears(config):
        weight, dense = checkpoint.linear(name), published.linear(name)
        assert isinstance(dense, np.ndarray)
        if form == "bf16" or name.endswith("kv_b_proj") or in_features % 32:
            assert isinstance(weight, np.ndarray) and np.array_equal(weight, dense)
            continue
        quantize = quantize_int8 if form == "int8" else quantize_int4
        assert isinstance(weight, PackedWeight) and weight.shape == (out_features, in_features)
        assert np.array_equal(weight.blocks, pack(quantize(as_f32(dense))).blocks)
    for layer, expert in ((1, 0), (2, 15)):
        ((path, offset, length),) = checkpoint.expert_extents(layer, expert)
        assert offset % align == 0 and path.suffix == ".kcpu"
        content = np.fromfile(path, np.uint8, length, offset=offset)
        weights = checkpoint.expert(layer, expert)
        assert content.tobytes() == b"".join(w.blocks.tobytes() for w in weights)  # type: ignore[union-attr]
        again = checkpoint.expert_from(layer, expert, [content])
        assert all(np.shares_memory(w.blocks, content) for w in again)  # type: ignore[union-attr]


def test_figures_and_entries(source: Path, good: Path) -> None:
    published, checkpoint = Checkpoint.open(source), Checkpoint.open(good)
    files = [*good.glob("*.kcpu"), *good.glob("*.safetensors")]
    assert len(files) == checkpoint.n_files > 6
    assert checkpoint.file_bytes == sum(path.stat().st_size for path in files)
    assert checkpoint.expert_bytes == 2 * 16 * (2 * 2 * 576 + 4 * 576)
    entries = {name: checkpoint.entry(name) for name in checkpoint.names()}
    assert checkpoint.total_bytes == sum(entry.nbytes for entry in entries.values())
    assert checkpoint.total_bytes == checkpoint.expert_bytes + checkpoint.trunk_bytes
    gate, up, down = (f"{EXPERT}.{p}_proj{BLOCKS}" for p in ("gate", "up", "down"))
    ((path, offset, length),) = checkpoint.expert_extents(1, 3)
    assert checkpoint.file_of(down) == path and entries[gate].begin == offset
    assert entries[gate].end == entries[up].begin and entries[down].end == offset + length
    assert {e.dtype for e in entries.values()} == {"INT4", "INT8", "BF16", "F32"}
    summary = summarise(checkpoint)
    assert summary.dtype_bytes["INT4"] == checkpoint.expert_bytes
    assert summary.n_parameters == summarise(published).n_parameters
    assert summary.one_expert_bytes == length
    with pytest.raises(KeyError):
        checkpoint.entry("no.such.tensor")
    for layer, expert in ((1, -1), (1, 16)):
        with pytest.raises(IndexError):
            checkpoint.expert(layer, expert)


def test_trunk_tensors_are_aligned(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    for name in checkpoint.names():
        entry = checkpoint.entry(name)
        if ".experts." not in name and entry.nbytes % 64 == 0:
            assert entry.begin % 64 == 0, name


def test_published_experts_from_buffers(source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    for layer, expert in ((1, 0), (2, 7)):
        extents = checkpoint.expert_extents(layer, expert)
        buffers = [np.fromfile(p, np.uint8, n, offset=o) for p, o, n in extents]
        weights = checkpoint.expert_from(layer, expert, buffers)
        for weight, was in zip(weights, checkpoint.expert(layer, expert), strict=True):
            assert isinstance(weight, Int4Weight) and isinstance(was, Int4Weight)
            assert np.array_equal(weight.packed, was.packed)
            assert np.array_equal(weight.scale, was.scale)


def test_the_model_computes_the_same(source: Path, tmp_path: Path) -> None:
    target = packed(source, tmp_path / "packed", trunk="bf16")
    ids = [3, 100, 250, 7]
    logits = []
    for folder in (source, target):
        with Engine.load(folder, precision="exact", backend="reference") as engine:
            logits.append(engine.score(ids))
    assert np.array_equal(*logits)


def test_k25_and_tied_heads(tmp_path: Path) -> None:
    def vision(tensors: dict[str, Any]) -> None:
        name = "vision_tower.x.weight"
        tensors[name] = (name, np.zeros(2, np.float32), "F32")

    wrapped = rewrite(tmp_path / "a", vision, values=wrap(tiny_config()))
    checkpoint = Checkpoint.open(packed(wrapped, tmp_path / "packed"))
    assert "model.norm.weight" in set(checkpoint.names())
    assert isinstance(checkpoint.linear("lm_head"), PackedWeight)
    tied = tiny_checkpoint(tmp_path / "b", tie_word_embeddings=True)
    checkpoint = Checkpoint.open(packed(tied, tmp_path / "tied"))
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    assert np.array_equal(checkpoint.linear("lm_head"), embedding)  # type: ignore[arg-type]


def test_closing_leaves_arrays_valid(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    gate, _, _ = checkpoint.expert(2, 15)
    assert isinstance(gate, PackedWeight)
    assert not gate.blocks.flags.owndata and not gate.blocks.flags.writeable
    checkpoint.close()
    assert np.isfinite(dequantize(gate)).all()


# What is wrong with the files.


@pytest.mark.parametrize("name", ["experts-00002.kcpu", "trunk-00001.safetensors"])
def test_missing_and_truncated_files(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for wrong in (content[:-1], content + b"\0", b""):
        (folder / name).write_bytes(wrong)
        problem = f"has {len(wrong)} bytes, {MANIFEST_NAME} says {len(content)}"
        fails(folder, problem, str(folder / name))
    (folder / name).unlink()
    fails(folder, "no such file", str(folder / name))


Change = Callable[[dict[str, Any]], object]


def change_manifest(folder: Path, change: Change) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(format="x"), "format is 'x'"),
        (lambda m: m.update(version=2), "version 2, this program reads 1"),
        (lambda m: m.update(version=True), "version True"),
        (lambda m: m.pop("source"), "is no object of format, version"),
        (lambda m: m.update(more=1), "is no object of format, version"),
        (lambda m: m.update(file_bytes=0), "file_bytes 0 is out of range"),
        (lambda m: m["experts"].update(align=512), "align 512 is not one of"),
        (lambda m: m["experts"].update(align=4096.0), "align 4096.0 is not one of"),
        (lambda m: m["experts"].update(records_per_file=0), "records_per_file 0 is out of range"),
        (lambda m: m["experts"].update(records_per_file=1 << 70), "is out of range"),
        (lambda m: m["experts"].update(records_per_file=3), "expert files, config.json asks for"),
        (lambda m: m["experts"]["files"].pop(), "expert files, config.json asks for"),
        (lambda m: m["experts"]["files"][0].update(bytes=1 << 61), "is not what config.json asks"),
        (lambda m: m["experts"]["files"][0].update(bytes=-1), "bytes -1 is out of range"),
        (lambda m: m["experts"]["files"][0].update(name="../experts-00001.kcpu"), "is no name of"),
        (lambda m: m["experts"]["files"][0].update(name="experts-00001.kcpu\n"), "is no name of"),
        (lambda m: m["experts"]["files"][0].update(name="experts-00002.kcpu"), "listed twice"),
        (lambda m: m["experts"]["files"][0]["chunks"].pop(), "is not what config.json asks"),
        (lambda m: m["experts"]["files"][0]["chunks"].clear(), "chunks do not fit"),
        (lambda m: m["experts"]["files"][0]["chunks"].reverse(), "chunks are out of order"),
        (lambda m: m["experts"]["files"][0]["chunks"][0].pop(), "is no .offset, length, checksum"),
        (lambda m: m["experts"]["files"][0]["chunks"][0].__setitem__(1, 1), "not what config.json"),
        (lambda m: m["experts"]["files"][0]["chunks"][0].__setitem__(2, "0"), "is no checksum"),
        (lambda m: m["experts"]["files"][0]["chunks"][0].__setitem__(0, None), "out of range"),
        (lambda m: m["experts"].update(files={}), "experts.files is no list"),
        (lambda m: m["trunk"].update(form="int2"), "trunk.form 'int2' is not one of"),
        (lambda m: m["trunk"].update(form=["int8"]), "is not one of"),
        (lambda m: m["trunk"]["files"][0].update(name="/etc/x.safetensors"), "is no name of"),
        (lambda m: m["trunk"]["files"][0].update(name=3), "is no name of"),
        (lambda m: m["trunk"]["files"][0].update(bytes=64), "chunks do not fit its 64 bytes"),
        (lambda m: m["trunk"]["files"].pop(), "is missing"),
        (lambda m: m["trunk"].update(rounding=[]), "rounding is no object"),
        (lambda m: m["trunk"].update(rounding={"a": {}}), "rounding of 'a'"),
        (
            lambda m: m["trunk"].update(rounding={"a\n": {"relative_l2": -1, "max_abs": 0}}),
            "out of range",
        ),
        (lambda m: m["copied"].append({"name": "../x", "bytes": 1, "crc32": "0" * 8}), "no plain"),
        (lambda m: m["copied"].append({"name": "a", "bytes": 1, "crc32": "xxxxxxxx"}), "checksum"),
        (lambda m: m["source"][0].update(header_sha256="0"), "is no checksum"),
        (lambda m: m["source"][0].update(name=".."), "is no plain file name"),
        (lambda m: m["source"].append(1), "a source file is no object"),
    ],
)
def test_hostile_manifest(folder: Path, change: Change, problem: str) -> None:
    change_manifest(folder, change)
    fails(folder, problem, str(folder))


def test_manifest_that_is_no_json(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(b"{\xff")
    fails(folder, "not valid JSON", MANIFEST_NAME)


def test_config_of_another_model(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text("utf-8"))
    for change in (
        {"n_routed_experts": 15},
        {"moe_intermediate_size": 64},
        {"moe_intermediate_size": 40},
        {"first_k_dense_replace": 2},
        {"vocab_size": 250},
        {"num_hidden_layers": 2},
    ):
        path.write_text(json.dumps(values | change), "utf-8")
        fails(folder, "config.json|groups of 32|is no tensor|is missing", str(folder))


def trunk_file(folder: Path, name: str) -> tuple[Path, dict[str, Any], bytes]:
    for path in sorted(folder.glob("trunk-*.safetensors")):
        header, data = read_raw(path)
        if name in header:
            return path, header, data
    raise AssertionError(f"{name} is nowhere")


def rewrite_trunk(folder: Path, name: str, change: Change) -> Path:
    """Change the header of the trunk file that holds `name`, and make the manifest agree."""
    path, header, data = trunk_file(folder, name)
    change(header)
    write_raw(path, header, data)

    def fit(manifest: dict[str, Any]) -> None:
        (file,) = [f for f in manifest["trunk"]["files"] if f["name"] == path.name]
        file["bytes"] = path.stat().st_size
        file["chunks"] = file["chunks"][:1]

    change_manifest(folder, fit)
    return path


def test_wrong_trunk(folder: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    path = rewrite_trunk(folder, norm, lambda h: h[norm].update(dtype="I16"))
    fails(folder, "has dtype I16", str(path), norm)
    rewrite_trunk(folder, norm, lambda h: h[norm].update(dtype="BF16", shape=[8, 8]))
    fails(folder, r"has shape \[8, 8\]", str(path), norm)
    rewrite_trunk(folder, norm, lambda h: h.update(stray=h.pop(norm)))
    fails(folder, "input_layernorm.weight is missing", str(folder))


def test_wrong_blocks(folder: Path) -> None:
    name = SHARED + BLOCKS
    path, header, _ = trunk_file(folder, name)
    shape = header[name]["shape"]
    for wrong in ([*shape[:2], 544, 2], [shape[0] * 2, shape[1], 544], [shape[0], shape[1] * 1088]):
        rewrite_trunk(folder, name, lambda h, wrong=wrong: h[name].update(shape=wrong))  # type: ignore[misc]
        fails(folder, "has shape", str(path), name)
    rewrite_trunk(folder, name, lambda h: h[name].update(shape=shape, dtype="I8"))
    fails(folder, "has dtype I8", str(path), name)
    rewrite_trunk(folder, name, lambda h: h.update({SHARED + ".weight": h.pop(name)}))
    fails(folder, "has shape", str(path), SHARED)


def test_kv_b_proj_must_not_be_packed(folder: Path) -> None:
    rewrite_trunk(
        folder, KV_B + ".weight", lambda h: h.update({KV_B + BLOCKS: h.pop(KV_B + ".weight")})
    )
    fails(folder, "kv_b_proj.weight is missing", str(folder))


def test_surplus_and_doubled_tensors(folder: Path) -> None:
    norm = "model.norm.weight"

    def swap(header: dict[str, Any]) -> None:
        header["model.layers.0.input_layernorm.weight"] = header.pop(norm)

    path = rewrite_trunk(folder, norm, swap)
    fails(folder, "is there twice", str(path), "layers.0.input_layernorm")


def spoil(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_scales_are_checked_when_first_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    ((path, offset, length),) = checkpoint.expert_extents(1, 3)
    checkpoint.close()
    spoil(path, offset + length - 2, b"\x80\x7f")  # the last scale of down: infinity
    checkpoint = Checkpoint.open(folder)
    checkpoint.expert(1, 2)
    buffer = np.fromfile(path, np.uint8, length, offset=offset)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="scale is NaN or infinity") as caught:
            checkpoint.expert(1, 3)
        assert str(path) in caught.value.message and f"{EXPERT}.down_proj" in caught.value.message
        with pytest.raises(CheckpointError, match="scale is NaN or infinity"):
            checkpoint.expert_from(1, 3, [buffer])
    error = checkpoint.find_non_finite(checkpoint.names())
    assert error is not None and EXPERT in error.message
    assert checkpoint.find_non_finite() is None


def test_scales_of_the_trunk_are_checked(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    entry, path = checkpoint.entry(SHARED + BLOCKS), checkpoint.file_of(SHARED + BLOCKS)
    weight = checkpoint.linear(SHARED)
    assert isinstance(weight, PackedWeight) and scales(weight).shape == (
        *weight.blocks.shape[:2],
        32,
    )
    checkpoint.close()
    spoil(path, entry.end - 2, b"\xff\xff")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=f"{SHARED}: a scale is NaN"):
        checkpoint.linear(SHARED)
    error = checkpoint.find_non_finite()
    assert error is not None and SHARED in error.message


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_corrupt_folders_never_escape(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Bytes changed anywhere: everything reads as arrays of the config's shapes, or UserError."""
    folder = tmp_path_factory.getbasetemp() / "corrupt-packed"
    small = tmp_path_factory.getbasetemp() / "small"
    shutil.rmtree(folder, ignore_errors=True)
    if not small.exists():
        tiny_checkpoint(small, num_hidden_layers=2, n_routed_experts=4)
    packed(small, folder)
    change_bytes(folder, data)
    read_or_refuse(folder)
