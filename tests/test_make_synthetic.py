"""tools/make_synthetic.py: the folder runs, resumes to the same bytes, refuses what it must."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from kimi_cpu.cli.main import main as cli
from kimi_cpu.config import ModelConfig
from kimi_cpu.engine import Engine
from kimi_cpu.kernels import reference
from kimi_cpu.quant import Int4Weight, dequantize, unpack_int4
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.tokenizer import Tokenizer
from tools import make_synthetic
from tools.make_synthetic import Arguments, Shard, Tensor, config_values, main, plan_shards
from tools.synthetic_tokenizer import tokenizer_files

GB = 1_000_000_000


def run(folder: Path, *extra: str, layers: int = 3) -> int:
    return main(["--out", str(folder), "--layers", str(layers), "--tiny", *extra])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    assert run(folder) == 0
    return folder


def test_opens_with_the_shape_asked_for(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (3, 1)
    assert (config.n_routed_experts, config.vocab_size) == (16, 512)
    assert checkpoint.n_files > 1
    assert {path.suffix for path in folder.iterdir()} == {
        ".json", ".safetensors", ".model", ".jinja"
    }  # fmt: skip
    assert checkpoint.find_non_finite(checkpoint.names()) is None
    checkpoint.close()


def test_weights_have_the_planned_distribution(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    experts = [checkpoint.expert(layer, e) for layer in (1, 2) for e in range(16)]
    for projection, in_features, damping in ((0, 64, 1), (1, 64, 1), (2, 32, 6)):
        weights = [expert[projection] for expert in experts]
        values = np.concatenate([dequantize(w).ravel() for w in weights])
        assert values.std() == pytest.approx((in_features * damping) ** -0.5, rel=0.03)
        assert abs(values.mean()) < 0.02 * values.std()
        int4 = [w for w in weights if isinstance(w, Int4Weight)]
        assert len({w.packed.tobytes() for w in int4}) == len(experts)
        assert len({w.scale.tobytes() for w in int4}) == len(experts)
        assert set(np.unique(unpack_int4(int4[0].packed))) == set(range(-8, 8))
    checkpoint.close()


def test_both_backends_agree(folder: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 512, 12).tolist()
    with (
        Engine.load(folder, precision="exact", threads=1) as simd,
        Engine.load(folder, precision="exact", threads=1, backend="reference") as plain,
    ):
        a, b = simd.score(ids), plain.score(ids)
    assert np.isfinite(b).all()
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def test_routing_spreads_and_activations_stay_bounded_over_all_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[np.ndarray] = []
    route = reference.route

    def recorded(*args: Any) -> Any:
        ids, weights = route(*args)
        chosen.append(ids)
        return ids, weights

    monkeypatch.setattr(reference, "route", recorded)
    assert run(tmp_path / "deep", "--experts", "32", layers=61) == 0
    ids = np.random.default_rng(1).integers(0, 512, 300).tolist()
    with Engine.load(tmp_path / "deep", precision="exact", backend="reference") as engine:
        logits = engine.score(ids)
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 2.0
    assert len(chosen) == 60
    for layer, experts in enumerate(chosen, start=1):
        loads = np.bincount(experts.ravel(), minlength=32)
        assert loads.max() < 4 * loads.mean(), f"layer {layer}"


TEXT = 'def f(x):\n    return {"Größe": [x, 2026]}  # 你好, it\'s 🙂 <|im_end|>'


@pytest.mark.parametrize("vocab", [512, 513, 1500, 8192, 163_840])
def test_a_tokenizer_of_exactly_the_vocabulary(vocab: int, tmp_path: Path) -> None:
    for name, data in tokenizer_files(vocab, 4096).items():
        (tmp_path / name).write_bytes(data)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.n_vocab, tokenizer.n_ranks) == (vocab, vocab - 256)
    ids = tokenizer.encode_text(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.n_ranks
    names = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_system|>": 10, "</think>": 23}
    names |= {"<|tool_call_begin|>": 13, "<|im_middle|>": 17, "[PAD]": 255}
    assert {name: tokenizer.control(name) - tokenizer.n_ranks for name in names} == names
    # Every piece that is text comes out as itself: none is there for nothing.
    for i in range(256, tokenizer.n_ranks, 1 + vocab // 5000):
        piece = tokenizer.token_bytes(i)
        assert tokenizer.encode_text(piece.decode()) == [i], piece


def test_tokens_are_what_others_are_joined_of(tmp_path: Path) -> None:
    """Pieces that are not whole words come about by merging two earlier ones."""
    for name, data in tokenizer_files(100_000, 4096).items():
        (tmp_path / name).write_bytes(data)
    tokenizer = Tokenizer.load(tmp_path)
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.n_ranks)]
    rank = {piece: i for i, piece in enumerate(pieces)}
    for i in range(1024, len(pieces)):  # the first are nano's
        whole = pieces[i]
        parts = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        assert any(max(rank.get(a, i), rank.get(b, i)) < i for a, b in parts), whole


def test_it_can_be_talked_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--model", str(folder), "--temp", "0", "--json", "--max-tokens", "5"]
    assert cli([*command, "What is 17 + 25?"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 5


def test_a_folder_without_tokenizer_is_completed(folder: Path, tmp_path: Path) -> None:
    """As versions before wrote them."""
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    written = {path.name: path.stat().st_mtime_ns for path in older.glob("*.safetensors")}
    for name in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja"):
        (older / name).unlink()
    assert run(older) == 0
    assert contents(older) == contents(folder)
    assert {path.name: path.stat().st_mtime_ns for path in older.glob("*.safetensors")} == written


def test_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(folder)
    assert run(tmp_path / "other", "--seed", "1") == 0
    ours, theirs = contents(folder), contents(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours if name.endswith(".safetensors"))


def test_a_tensor_depends_on_its_name_alone(folder: Path, tmp_path: Path) -> None:
    """Of two models of as many layers, one with more experts has the other's bytes too."""
    assert run(tmp_path / "wide", "--experts", "24") == 0
    small, wide = Checkpoint.open(folder), Checkpoint.open(tmp_path / "wide")
    for name in ("model.layers.2.mlp.experts.15.down_proj", "model.layers.1.self_attn.o_proj"):
        assert np.array_equal(dequantize(small.linear(name)), dequantize(wide.linear(name)))
    small.close()
    wide.close()


def interrupted(after: int) -> Callable[[Tensor, int], Iterator[memoryview]]:
    """`chunks` that is interrupted when `after` tensors are written."""
    chunks, count = make_synthetic.chunks, 0

    def broken(tensor: Tensor, seed: int) -> Iterator[memoryview]:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return chunks(tensor, seed)

    return broken


def test_resumes_to_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    in_first = list(weight_map.values()).count("model-00001-of-000003.safetensors")
    resumed = tmp_path / "resumed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_synthetic, "chunks", interrupted(in_first + 5))
        assert run(resumed) == 130
    assert "same command continues" in capsys.readouterr().err
    shards = [path.name for path in resumed.iterdir() if "safetensors" in path.name]
    assert shards == ["model-00001-of-000003.safetensors"]  # no partial file, no index
    written = (resumed / shards[0]).stat().st_mtime_ns
    # What a killed run leaves: part of a shard under its temporary name.
    (resumed / "model-00002-of-000003.safetensors.part").write_bytes(b"half a sh")
    assert run(resumed) == 0
    assert contents(resumed) == contents(folder)
    assert (resumed / shards[0]).stat().st_mtime_ns == written


def test_a_truncated_shard_is_written_again(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with (copy / "model-00002-of-000003.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert run(copy) == 0
    assert contents(copy) == contents(folder)


def test_other_arguments_in_the_same_folder_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert run(folder, "--seed", "7") == 2
    assert "seed 0 there, 7 here" in capsys.readouterr().err
    assert run(folder, "--experts", "24") == 2
    assert "experts 16 there, 24 here" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run(tmp_path) == 2
    assert "not made by this program" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert run(tmp_path / "config.json") == 2
    assert "is a file" in capsys.readouterr().err


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GB, 90 * GB, 10 * GB))
    assert main(["--out", str(tmp_path / "big"), "--layers", "2"]) == 1
    error = capsys.readouterr().err
    assert "11.04 GB to write, but only 10.00 GB are free" in error
    assert "hint: " in error
    assert not (tmp_path / "big").exists()


def test_only_what_is_missing_needs_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = make_synthetic.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(GB, GB - free, free))
    assert run(folder) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--dense", "4"), "--dense 4 does not fit --layers 3"),
        (("--dense", "-1"), "--dense -1"),
        (("--vocab", "511"), "--vocab 511 is below 512"),
        (("--experts", "2"), "num_experts_per_tok"),
        (("--experts", "0"), "n_routed_experts"),
    ],
)
def test_arguments_that_make_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], message: str
) -> None:
    assert run(tmp_path / "none", *extra) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("layers", "dense"), [(1, 1), (1, 0), (2, 2)])
def test_without_dense_layers_or_without_experts(tmp_path: Path, layers: int, dense: int) -> None:
    assert run(tmp_path / "model", "--dense", str(dense), layers=layers) == 0
    with Engine.load(tmp_path / "model", backend="reference") as engine:
        assert np.isfinite(engine.score([1, 2, 3])).all()


def planned(layers: int, vocab: int) -> list[Shard]:
    values = config_values(Arguments(layers, 1, 384, vocab, 0, tiny=False))
    return plan_shards(ModelConfig.from_dict(values), make_synthetic.FULL.shard_bytes)


def test_full_size_is_what_is_published() -> None:
    shards = planned(layers=61, vocab=163840)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    experts = sum(tensor.nbytes for tensor in tensors if ".mlp.experts." in tensor.name)
    total = sum(shard.nbytes for shard in shards)
    assert 570 * GB < experts < 572 * GB
    assert 593 * GB < total < 595 * GB
    assert len(tensors) == len({tensor.name for tensor in tensors})
    largest = max(sum(tensor.nbytes for tensor in shard.tensors) for shard in shards)
    assert largest == 163840 * 7168 * 2  # the embedding has a file to itself


def test_two_layers_of_full_width_take_about_11_gb() -> None:
    shards = planned(layers=2, vocab=8192)
    assert 10.5 * GB < sum(shard.nbytes for shard in shards) < 11.5 * GB
    assert all(shard.nbytes < 2.1 * GB for shard in shards)


def test_help_says_that_there_is_no_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "tokenizer" in capsys.readouterr().out
