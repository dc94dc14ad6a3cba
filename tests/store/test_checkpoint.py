"""Checkpoint folders: good ones are read in place, each kind of bad one gives one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import CheckpointError, ConfigError
from kimi_cpu.quant import Int4Weight, bf16_to_f32, dequantize, f32_to_bf16
from kimi_cpu.store import tensors as tensors_module
from kimi_cpu.store.checkpoint import INDEX_NAME, Checkpoint
from kimi_cpu.store.layout import expert_linears, trunk_linears, vectors
from kimi_cpu.store.writer import NamedTensor, int4_tensors, write_checkpoint
from tests.store.raw import change_bytes, read_or_refuse, read_raw, write_raw
from tests.test_config import wrap
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tensors

GATE = "model.layers.1.mlp.experts.3.gate_proj"
NORM = "model.layers.0.input_layernorm.weight"
Change = Callable[[dict[str, NamedTensor]], object]


def rewrite(folder: Path, change: Change, **options: Any) -> Path:
    """A tiny checkpoint whose tensors were changed before writing."""
    values = options.pop("values", None) or tiny_config(**options)
    config = ModelConfig.from_dict(values)
    tensors = {t[0]: t for t in tiny_tensors(config, 0, config.quantized)}
    change(tensors)
    return write_checkpoint(folder, values, tensors.values(), 60_000)


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / INDEX_NAME).read_text("utf-8"))
    return folder / str(index["weight_map"][name])


def fails(folder: Path, problem: str, *named: str) -> CheckpointError:
    """Opening must fail with one line that holds `problem` and names what is wrong."""
    with pytest.raises(CheckpointError, match=problem) as caught:
        Checkpoint.open(folder)
    for text in named:
        assert text in caught.value.message
    assert caught.value.hint and caught.value.message.isprintable()
    return caught.value


@pytest.mark.parametrize("int4", [True, False])
@pytest.mark.parametrize("rest", ["bf16", "f32"])
@pytest.mark.parametrize("shard_bytes", [20_000, 1 << 30])
def test_reads_what_was_written(tmp_path: Path, int4: bool, rest: str, shard_bytes: int) -> None:
    folder = tiny_checkpoint(tmp_path, 3, int4, rest, shard_bytes)
    single = shard_bytes > 1_000_000
    assert (folder / "model.safetensors").exists() == single
    assert (folder / INDEX_NAME).exists() != single
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.n_files == 1) == single
    config = checkpoint.config
    tensors = {name: array for name, array, _ in tiny_tensors(config, 3, int4, rest)}
    assert set(checkpoint.names()) == set(tensors)
    for name, _ in vectors(config):
        assert np.array_equal(checkpoint.tensor(name), tensors[name])
    for name, out_features, in_features in [*trunk_linears(config), *expert_linears(config)]:
        weight = checkpoint.linear(name)
        assert weight.shape == (out_features, in_features)
        if isinstance(weight, Int4Weight):
            assert weight.packed.tobytes() == tensors[f"{name}.weight_packed"].tobytes()
            assert np.array_equal(weight.scale, tensors[f"{name}.weight_scale"])
        else:
            assert np.array_equal(weight, tensors[f"{name}.weight"])
        assert isinstance(weight, Int4Weight) == (int4 and ".experts." in name)
    total = sum(array.nbytes for array in tensors.values())
    assert checkpoint.total_bytes == total == checkpoint.expert_bytes + checkpoint.trunk_bytes
    assert checkpoint.file_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_tensors_are_views_on_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))
    gate, up, down = checkpoint.expert(2, 15)
    assert gate.shape == up.shape == (32, 64) and down.shape == (64, 32)
    assert isinstance(gate, Int4Weight)
    for array in (gate.packed, gate.scale, checkpoint.tensor(NORM)):
        assert not array.flags.owndata and not array.flags.writeable
    checkpoint.close()
    assert np.isfinite(dequantize(gate)).all()


def test_published_nibble_order(tmp_path: Path) -> None:
    """[-8..7] packs to 0x76543210, 0xfedcba98 (compressed-tensors' order)."""
    row = np.tile(np.array([0x76543210, 0xFEDCBA98], np.uint32), 4).view(np.int32)

    def change(tensors: dict[str, NamedTensor]) -> None:
        packed = np.tile(row, (32, 1))
        tensors[f"{GATE}.weight_packed"] = (f"{GATE}.weight_packed", packed, "I32")
        scale = np.full((32, 2), 0x4000, np.uint16)  # 2.0
        tensors[f"{GATE}.weight_scale"] = (f"{GATE}.weight_scale", scale, "BF16")

    weight = Checkpoint.open(rewrite(tmp_path, change)).linear(GATE)
    assert np.array_equal(dequantize(weight)[5], 2.0 * np.tile(np.arange(-8, 8), 4))


def test_compressed_tensors_packs_alike(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    pack = getattr(compressors, "pack_to_int32", None)
    if pack is None:
        helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
        pack = helpers.pack_to_int32
    weight = Checkpoint.open(tiny_checkpoint(tmp_path)).linear(GATE)
    assert isinstance(weight, Int4Weight)
    q = np.rint(dequantize(weight) / np.repeat(bf16_to_f32(weight.scale), 32, axis=1))
    packed = pack(torch.tensor(q, dtype=torch.int8), 4)
    assert packed.numpy().tobytes() == weight.packed.tobytes()


def test_weight_shape_may_be_int64_or_missing(tmp_path: Path) -> None:
    def as_int64(tensors: dict[str, NamedTensor]) -> None:
        shape = np.array([32, 64], np.int64)
        tensors[f"{GATE}.weight_shape"] = (f"{GATE}.weight_shape", shape, "I64")

    Checkpoint.open(rewrite(tmp_path / "a", as_int64)).linear(GATE)
    without = rewrite(tmp_path / "b", lambda tensors: tensors.pop(f"{GATE}.weight_shape"))
    Checkpoint.open(without).linear(GATE)


def test_any_projection_may_be_int4(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"

    def change(tensors: dict[str, NamedTensor]) -> None:
        del tensors[f"{name}.weight"]
        packed = np.zeros((64, 48), np.uint8)
        scale = f32_to_bf16(np.ones((64, 3), np.float32))
        tensors |= {t[0]: t for t in int4_tensors(name, Int4Weight(packed, scale))}

    assert isinstance(Checkpoint.open(rewrite(tmp_path, change)).linear(name), Int4Weight)


def test_k25_prefix_and_skipped_towers(tmp_path: Path) -> None:
    zero = np.zeros(2, np.float32)

    def change(tensors: dict[str, NamedTensor]) -> None:
        for name in ("vision_tower.x.weight", "mm_projector.y.weight"):
            tensors[name] = (name, zero, "F32")

    folder = rewrite(tmp_path / "a", change, values=wrap(tiny_config()))
    checkpoint = Checkpoint.open(folder)
    assert NORM in checkpoint.names() and all("vision" not in n for n in checkpoint.names())
    assert checkpoint.tensor(NORM).shape == (64,) and checkpoint.linear(GATE).shape == (32, 64)
    assert checkpoint.file_of(NORM) == shard_of(folder, f"language_model.{NORM}")

    def stray(tensors: dict[str, NamedTensor]) -> None:
        tensors["audio.x"] = ("audio.x", zero, "F32")

    fails(rewrite(tmp_path / "b", stray, values=wrap(tiny_config())), "audio.x is no tensor")


def test_known_extras_are_skipped(tmp_path: Path) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        for name in (
            "model.layers.3.mlp.gate.weight",
            "model.layers.3.eh_proj.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
        ):
            tensors[name] = (name, np.zeros(2, np.float32), "F32")

    checkpoint = Checkpoint.open(rewrite(tmp_path / "a", change, num_nextn_predict_layers=1))
    assert not [name for name in checkpoint.names() if "layers.3." in name or "inv_freq" in name]
    fails(rewrite(tmp_path / "b", change), "model.layers.3.mlp.gate.weight is no tensor")


@pytest.mark.parametrize("with_head", [True, False])
def test_tied_head_is_the_embedding(tmp_path: Path, with_head: bool) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        if with_head:
            head = np.zeros((256, 64), np.uint16)
            tensors["lm_head.weight"] = ("lm_head.weight", head, "BF16")

    checkpoint = Checkpoint.open(rewrite(tmp_path, change, tie_word_embeddings=True))
    head = checkpoint.linear("lm_head")
    assert isinstance(head, np.ndarray)
    assert np.array_equal(head, checkpoint.tensor("model.embed_tokens.weight"))
    assert "lm_head.weight" not in set(checkpoint.names())


def test_symlinks_as_in_the_hub_cache(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    assert Checkpoint.open(links).n_files > 1


# What is wrong with the files.


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), "utf-8")
    fails(tmp_path, "neither model.safetensors.index.json nor model.safetensors is here")


def test_missing_shard(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    shard = shard_of(folder, NORM)
    shard.unlink()
    assert "incomplete" in fails(folder, "no such file", str(shard)).hint


def test_truncated_shard(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    shard = shard_of(folder, NORM)
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    fails(folder, r"ends at byte \d+, the file has only", str(shard))


def test_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    path = folder / INDEX_NAME
    index = json.loads(path.read_text("utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    shard = index["weight_map"][NORM]
    index["weight_map"][NORM] = next(s for s in shards if s != shard)
    path.write_text(json.dumps(index), "utf-8")
    fails(folder, f"belongs into {index['weight_map'][NORM]}", str(folder / shard), NORM)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    path = folder / INDEX_NAME
    index = json.loads(path.read_text("utf-8"))
    shard = index["weight_map"].pop(NORM)
    path.write_text(json.dumps(index), "utf-8")
    fails(folder, f"{NORM} is missing there by {INDEX_NAME}", str(folder / shard))
    index["weight_map"] |= {NORM: shard, "ghost.weight": shard}
    path.write_text(json.dumps(index), "utf-8")
    fails(folder, "ghost.weight is not in the file", str(folder / shard))


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        (None, "weight_map is missing"),
        ({}, "weight_map is missing, empty"),
        (["a"], "weight_map is missing, empty or no object"),
        ({"a": 3}, "something else than file names"),
        ({"a": "../model.safetensors"}, "'../model.safetensors' is no name"),
        ({"a": "/etc/x.safetensors"}, "is no name of a .safetensors file"),
        ({"a": "sub/x.safetensors"}, "is no name of a .safetensors file"),
        ({"a": "..\\x.safetensors"}, "is no name of a .safetensors file"),
        ({"a": "c:x.safetensors"}, "is no name of a .safetensors file"),
        ({"a": ".safetensors"}, "is no name of a .safetensors file"),
        ({"a": "config.json"}, "is no name of a .safetensors file"),
        ({"a": "x\0.safetensors"}, "is no name of a .safetensors file"),
        ({"a": "\ud800.safetensors"}, "is no name of a .safetensors file"),
    ],
)
def test_hostile_index(tmp_path: Path, weight_map: Any, problem: str) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    fails(folder, problem, INDEX_NAME)


def test_broken_index(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": "b", "a": "c"}}', "utf-8")
    fails(folder, "key 'a' appears twice", INDEX_NAME)


@pytest.mark.parametrize(
    "name", [NORM, "lm_head.weight", f"{GATE}.weight_packed", f"{GATE}.weight_scale"]
)
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    folder = rewrite(tmp_path, lambda tensors: tensors.pop(name))
    missing = f"{GATE}.weight" if name.endswith("packed") else name
    fails(folder, f"tensor {missing} is missing", str(folder))


def test_surplus_tensor(tmp_path: Path) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        name = "model.layers.0.self_attn.o_proj.bias"
        tensors[name] = (name, np.zeros(64, np.float32), "F32")

    folder = rewrite(tmp_path, change)
    shard = shard_of(folder, "model.layers.0.self_attn.o_proj.bias")
    fails(folder, "o_proj.bias is no tensor of the model", str(shard))


@pytest.mark.parametrize(
    ("name", "array", "tag", "problem"),
    [
        (NORM, np.zeros(63, np.uint16), "BF16", r"shape \[63\], config.json asks for \[64\]"),
        (NORM, np.zeros((64, 1), np.uint16), "BF16", r"shape \[64, 1\]"),
        (NORM, np.zeros(64, np.int32), "I32", "dtype I32, here only BF16 or F32"),
        ("lm_head.weight", np.zeros((64, 256), np.uint16), "BF16", r"asks for \[256, 64\]"),
        (f"{GATE}.weight_packed", np.zeros((32, 64), np.int32), "I32", r"asks for \[32, 8\]"),
        (f"{GATE}.weight_packed", np.zeros((32, 8), np.float32), "F32", "dtype F32, here only I32"),
        (f"{GATE}.weight_scale", np.zeros((32, 1), np.uint16), "BF16", r"asks for \[32, 2\]"),
        (f"{GATE}.weight_scale", np.zeros((32, 2), np.float32), "F32", "F32, here only BF16"),
        (f"{GATE}.weight_shape", np.zeros(3, np.int32), "I32", r"asks for \[2\]"),
        (f"{GATE}.weight_shape", np.zeros(2, np.float32), "F32", "here only I32 or I64"),
    ],
)
def test_wrong_shape_or_dtype(
    tmp_path: Path, name: str, array: np.ndarray, tag: str, problem: str
) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        tensors[name] = (name, array, tag)

    folder = rewrite(tmp_path, change)
    fails(folder, problem, f"{shard_of(folder, name)}: {name}")


def test_float16_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    shard = shard_of(folder, NORM)
    header, data = read_raw(shard)
    header[NORM]["dtype"] = "F16"
    write_raw(shard, header, data)
    fails(folder, f"{NORM} has dtype F16", str(shard))


def test_int4_needs_whole_groups(tmp_path: Path) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        packed = (f"{GATE}.weight_packed", np.zeros((32, 5), np.int32), "I32")
        tensors[packed[0]] = packed
        del tensors[f"{GATE}.weight"]

    folder = rewrite(tmp_path, change, int4=False, hidden_size=40)
    fails(folder, "40 input features do not divide into INT4 groups of 32", GATE)


# What only the data tells, when it is first read.


def test_scales_are_checked_when_read(tmp_path: Path) -> None:
    for i, bits in enumerate((0x7F80, 0xFF80, 0x7FC0, 0xFFFF)):  # inf, -inf, nan, -nan

        def change(tensors: dict[str, NamedTensor], bits: int = bits) -> None:
            tensors[f"{GATE}.weight_scale"][1][7, 1] = bits

        folder = rewrite(tmp_path / str(i), change)
        checkpoint = Checkpoint.open(folder)
        checkpoint.expert(1, 2)
        name = f"{GATE}.weight_scale"
        for _ in range(2):
            with pytest.raises(CheckpointError, match="holds NaN or infinity") as caught:
                checkpoint.expert(1, 3)
            assert f"{shard_of(folder, name)}: {name}" in caught.value.message


@pytest.mark.parametrize("bits", [0x7F7F, 0xFF7F, 0x8000, 0x0000])
def test_largest_finite_scales_pass(tmp_path: Path, bits: int) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        tensors[f"{GATE}.weight_scale"][1][:] = bits

    Checkpoint.open(rewrite(tmp_path, change)).linear(GATE)


def test_weight_shape_must_agree(tmp_path: Path) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        tensors[f"{GATE}.weight_shape"][1][:] = (64, 32)

    folder = rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"weight_shape says \[64, 32\]") as caught:
        Checkpoint.open(folder).linear(GATE)
    assert str(shard_of(folder, f"{GATE}.weight_shape")) in caught.value.message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_small_dense_tensors_are_checked_when_read(tmp_path: Path, value: float) -> None:
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"

    def change(tensors: dict[str, NamedTensor]) -> None:
        tensors[bias][1][3] = value

    folder = rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=f"{bias} holds NaN or infinity"):
        Checkpoint.open(folder).tensor(bias)


def test_large_dense_tensors_can_be_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, NamedTensor]) -> None:
        tensors["lm_head.weight"][1][100, 3] = 0x7FC0

    monkeypatch.setattr(tensors_module, "CHECK_BYTES", 1000)
    checkpoint = Checkpoint.open(rewrite(tmp_path / "a", change))
    checkpoint.linear("lm_head")  # too large to be read through at once
    error = checkpoint.find_non_finite()
    assert error is not None and "lm_head.weight holds NaN" in error.message
    assert Checkpoint.open(tiny_checkpoint(tmp_path / "b")).find_non_finite() is None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_corrupt_folders_never_escape(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Bytes changed anywhere: everything reads as arrays of the config's shapes, or UserError."""
    folder = tmp_path_factory.getbasetemp() / "corrupt"
    tiny_checkpoint(folder, num_hidden_layers=2, n_routed_experts=4, shard_bytes=100_000)
    change_bytes(folder, data)
    read_or_refuse(folder)


@pytest.mark.parametrize("int4", [True, False])
@pytest.mark.parametrize("shard_bytes", [3_000, 1 << 30])
def test_extents_are_the_bytes_of_an_expert(tmp_path: Path, int4: bool, shard_bytes: int) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, int4=int4, shard_bytes=shard_bytes))
    base = "model.layers.2.mlp.experts.5."
    names = [name for name in checkpoint.names() if name.startswith(base)]
    at = {(checkpoint.file_of(n), checkpoint.entry(n).begin): checkpoint.entry(n) for n in names}
    extents = checkpoint.expert_extents(2, 5)
    assert extents == sorted(extents)
    assert sum(extent.length for extent in extents) == sum(e.nbytes for e in at.values())
    for extent in extents:  # tensors of the expert follow each other from end to end
        position = extent.offset
        while position < extent.offset + extent.length:
            position = at.pop((extent.path, position)).end
        assert position == extent.offset + extent.length
    assert not at
    if not int4 and shard_bytes > 1_000_000:
        assert len(extents) == 1
