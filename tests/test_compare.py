"""bench/compare.py without its peers: the table, the records, and the GGUF file."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import compare
from bench.compare import spec_of, trunk_of
from bench.standings import (
    OURS,
    Contestant,
    Turn,
    markdown,
    relative_error,
    tabulate,
    unfair,
)
from kimi_cpu.benchmark.runner import Test
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import UserError
from kimi_cpu.kernels import bandwidth
from kimi_cpu.quant import as_f32, dequantize, f32_to_bf16, pack, quantize_int4, quantize_int8
from kimi_cpu.store.checkpoint import Checkpoint
from tests.tiny import tiny_checkpoint, tiny_config

TESTS = [Test(8, 0), Test(0, 4, 6)]
PEER = "llama.cpp"
TINY_VOCAB = tiny_config()["vocab_size"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=1)


def contestant(engine: str, trunk: str) -> Contestant:
    return Contestant(engine, trunk, Path(f"{engine}-{trunk}"))


def turn(who: Contestant, number: int, seconds: list[float], system: str = "AVX512 = 1") -> Turn:
    """A turn whose 8 or 4 tokens took `seconds`, sample by sample."""
    ours = who.engine == OURS
    return Turn(
        engine=who.engine,
        version="1",
        system="avx512vnni" if ours else system,
        settings="-x 1",
        seconds={test.name: seconds for test in TESTS},
        logits={test.name: [0.0, 1.0, 2.0] for test in TESTS},
        ceiling_fraction={test.name: 0.9 for test in TESTS} if ours else {},
        ceiling_gbps={test.name: 35.0 for test in TESTS} if ours else {},
        label=who.label,
        round=number,
    )


def test_table_of_ratios():
    ours, theirs = contestant(OURS, "bf16"), contestant(PEER, "bf16")
    turns = [
        turn(ours, 0, [1.0, 2.0]),
        turn(theirs, 0, [2.0, 4.0]),
        turn(theirs, 1, [4.0, 8.0]),
        turn(ours, 1, [1.0, 2.0]),
    ]
    [table] = tabulate([ours, theirs], turns, TESTS)
    assert list(table.cells) == ["kimi-cpu, bf16", "llama.cpp, bf16"]
    assert list(table.cells[ours.label]) == ["pp8", "tg4 @ d6"]
    cell = table.cells[theirs.label]["pp8"]
    assert sorted(cell.samples_ts) == [1, 2, 2, 4]
    assert (cell.median_ts, cell.min_ts, cell.max_ts, cell.avg_ts) == (2, 1, 4, 2.25)
    ratio = table.ratios[theirs.label]["pp8"]
    assert (ratio.median, ratio.min, ratio.max) == (3, 2, 4)
    text = markdown([table], turns)
    assert "of 2 rounds x 2" in text
    assert "| kimi-cpu, bf16 | 6.00 (4.00-8.00) | 3.00 (2.00-4.00) |" in text
    assert "| llama.cpp, bf16 | 3.00 (2.00-4.00) | 3.00 (2.00-4.00) |" in text
    assert table.limits == {"pp8": pytest.approx(6 / 0.9), "tg4 @ d6": pytest.approx(3 / 0.9)}
    assert "| limit of memory | 6.7 | 3.3 |" in text
    assert "best plain reader of memory 35.0-35.0 GB/s" in text
    assert "- llama.cpp, bf16: 1; -x 1; AVX512; its logits are 0.0%-0.0% of their" in text


def test_each_trunk_is_compared_with_its_like():
    """Peers of a kind that none of our models has are compared with the first one."""
    ours, packed = contestant(OURS, "bf16"), contestant(OURS, "q8_0")
    theirs, theirs_q8 = contestant(PEER, "bf16"), contestant(PEER, "q8_0")
    everyone = [ours, packed, theirs, theirs_q8]
    turns = [turn(who, 0, [1.0]) for who in everyone]
    first, second = tabulate(everyone, turns, TESTS)
    assert list(first.cells) == [ours.label, theirs.label]
    assert list(second.cells) == ["kimi-cpu, int8 groups", "llama.cpp, Q8_0"]
    turns = [t for t in turns if t.label != packed.label]
    unlike = tabulate(everyone, turns, TESTS)[1]
    assert list(unlike.cells) == [ours.label, theirs_q8.label]
    assert unlike.limits == {} and second.limits != {}
    alone = tabulate(everyone, [t for t in turns if t.engine == OURS], TESTS)
    assert [list(table.cells) for table in alone] == [[ours.label]]
    no_ours = tabulate(everyone, [t for t in turns if t.engine == PEER], TESTS)
    assert [table.ratios for table in no_ours] == [{}, {}]


def test_a_peer_without_the_machines_instructions_is_named():
    ours, theirs = contestant(OURS, "bf16"), contestant(PEER, "bf16")
    fair = [turn(ours, 0, [1.0]), turn(theirs, 0, [1.0])]
    assert unfair(fair) == []
    weak = [turn(ours, 0, [1.0]), turn(theirs, 0, [1.0], "AVX2 = 1 | AVX512 = 0")]
    [text] = unfair(weak)
    assert text.startswith("llama.cpp was built without AVX-512")
    assert "NOT FAIR: llama.cpp" in markdown(tabulate([ours, theirs], weak, TESTS), weak)


def test_relative_error():
    reference = [0.0, 1.0, 2.0, 3.0]
    assert relative_error(reference, reference) == 0
    assert relative_error([v + np.std(reference) for v in reference], reference) == pytest.approx(1)


def test_spec_is_what_the_peer_needs(tiny, tmp_path):
    config = ModelConfig.load(tiny)
    spec = json.loads(json.dumps(spec_of(PEER, tmp_path / "m.gguf", config, TESTS, 2, 3, 5)))
    assert len(spec["ids"]) == 10 and max(spec["ids"]) < config.vocab_size
    assert spec["tests"][1] == {"name": "tg4 @ d6", "n_prompt": 0, "n_gen": 4, "n_depth": 6}
    assert spec["mha_shape"]["deepseek2.attention.key_length"] == config.qk_head_dim
    yarn = config.rope_scaling
    assert yarn and spec["yarn"] == {
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
    }


def test_the_trunk_of_a_model(tiny):
    assert trunk_of(tiny) == "bf16"


@pytest.fixture
def no_processes(monkeypatch):
    """Our turns run in this process, peers are made up and fail if they are in this set."""
    failing: set[str] = set()

    def run_here(command: list[str], cwd: Path, **options: object) -> SimpleNamespace:
        if command[0] == "git":
            return SimpleNamespace(returncode=1, stdout="")
        if command[2] == "bench.compare":
            return SimpleNamespace(returncode=compare.main(command[3:]), stderr="")
        spec, answer = json.loads(Path(command[3]).read_text()), Path(command[4])
        if spec["engine"] in failing:
            return SimpleNamespace(returncode=-9, stderr="loading\nout of memory\n")
        result = asdict(turn(contestant(spec["engine"], "bf16"), 0, []))
        logits = np.random.default_rng(0).standard_normal(TINY_VOCAB).tolist()
        result["seconds"] = {test["name"]: [1.0] for test in spec["tests"]}
        result["logits"] = {test["name"]: logits for test in spec["tests"]}
        answer.write_text(json.dumps(result))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run_here, PIPE=-1, DEVNULL=-3))
    monkeypatch.setattr(compare, "gguf_file", lambda *args: Path("there.gguf"))
    monkeypatch.setattr(bandwidth, "READ_BYTES", 64 << 20)
    return failing


def run(tiny: Path, results: Path, engines: str, *more: str) -> int:
    args = ["-m", str(tiny), "-p", "8", "-n", "2", "-d", "3", "-r", "1", "-t", "1"]
    return compare.main([*args, "--engines", engines, "--results", str(results), *more])


def test_the_whole_program_and_its_record(tiny, tmp_path, no_processes, capfd):
    record = tmp_path / "results" / "here.jsonl"
    code = run(tiny, record, f"{OURS},{PEER}", "--rounds", "2")
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "| t/s | pp8 @ d3 | tg2 @ d3 |" in out and "of 2 rounds x 1" in out
    assert "| kimi-cpu, bf16 is n times as fast as | pp8 @ d3 |" in out
    assert str(record) in err
    [line] = record.read_text().splitlines()
    value = json.loads(line)
    [table] = value["tables"]
    assert list(table["cells"]) == ["kimi-cpu, bf16", "llama.cpp, bf16"]
    assert len(table["cells"]["llama.cpp, bf16"]["tg2 @ d3"]["samples_ts"]) == 2
    assert set(table["ratios"]["llama.cpp, bf16"]["pp8 @ d3"]) == {"median", "min", "max"}
    assert [(t["label"], t["round"]) for t in value["turns"]] == [
        ("kimi-cpu, bf16", 0), ("kimi-cpu, bf16", 1),
        ("llama.cpp, bf16", 0), ("llama.cpp, bf16", 1),
    ]  # fmt: skip
    assert value["commit"] == "" and value["models"] == [tiny.name] and value["failed"] == {}
    assert value["started"].endswith("Z") and "logits" not in value["turns"][0]


def test_a_peer_that_fails_leaves_the_others(tiny, tmp_path, no_processes, capfd):
    no_processes.add(PEER)
    record = tmp_path / "here.jsonl"
    assert run(tiny, record, f"{OURS},{PEER},ik_llama.cpp", "--rounds", "1") == 1
    out, err = capfd.readouterr()
    assert "error: llama.cpp, bf16: llama.cpp ended with -9: out of memory\nhint: " in err
    assert "| llama.cpp, bf16 |" not in out and "| ik_llama.cpp, bf16 |" in out
    failed = json.loads(record.read_text())["failed"]
    assert failed == {"llama.cpp, bf16": "llama.cpp ended with -9: out of memory"}


def test_if_all_fail_nothing_is_recorded(tiny, tmp_path, no_processes, capfd):
    no_processes.add(PEER)
    assert run(tiny, tmp_path / "no.jsonl", PEER, "--rounds", "1") == 1
    out, err = capfd.readouterr()
    assert out == "" and "out of memory" in err and not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize("complete", [0, 1])
def test_an_interrupt_keeps_complete_rounds(
    complete, tiny, tmp_path, no_processes, monkeypatch, capfd
):
    made_up, calls = compare.peer_turn, []

    def interrupted(*args: Any) -> Turn:
        calls.append(args)
        if len(calls) > complete:
            raise KeyboardInterrupt
        return made_up(*args)

    monkeypatch.setattr(compare, "peer_turn", interrupted)
    record = tmp_path / "here.jsonl"
    assert run(tiny, record, PEER, "--rounds", "3") == 130
    out, err = capfd.readouterr()
    if complete:
        assert err.endswith("interrupted after 1 of 3 rounds\n") and "of 1 rounds x 1" in out
        assert json.loads(record.read_text())["rounds"] == 1
    else:
        assert err.endswith("interrupted before the first round was complete\n")
        assert not record.exists()


def test_two_models_of_one_kind_are_refused(tiny, tmp_path, no_processes, capfd):
    assert run(tiny, tmp_path / "no.jsonl", OURS, "-m", str(tiny)) == 2
    assert "two models keep their weights as bf16" in capfd.readouterr().err


def test_a_gguf_file_is_kept_for_the_same_weights(tiny, tmp_path, monkeypatch):
    written = []

    def write(python: str, source: Path, path: Path, trunk: str) -> None:
        path.write_bytes(b"")
        written.append((path, trunk))

    monkeypatch.setattr(compare, "write_gguf", write)
    path = compare.gguf_file("python", tiny, tmp_path, "bf16")
    assert written == [(path, "bf16")]
    assert re.fullmatch(rf"{tiny.name}-[0-9a-f]{{12}}-bf16\.gguf", path.name)
    assert path.parent == tmp_path.resolve()
    # A copy, whenever it was made, or with other files beside the weights.
    copy = shutil.copytree(tiny, tmp_path / "copy" / tiny.name)
    (copy / "notes.txt").write_text("")
    os.utime(copy / "config.json")
    assert compare.gguf_file("python", copy, tmp_path, "bf16") == path and len(written) == 1
    shards = sorted(copy.glob("*.safetensors"))
    for shard in (shards[0], shards[-1]):
        with shard.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        compare.gguf_file("python", copy, tmp_path, "bf16")
    assert len({path for path, _ in written}) == len(written) == 3


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--engines", "vllm"], "unknown engine 'vllm'"),
        (["--trunk", "q2_k"], "unknown --trunk 'q2_k'"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["--rounds", "0"], "nothing to measure"),
    ],
)
def test_wrong_options(tiny, args, text, capsys):
    assert compare.main(["-m", str(tiny), *args]) == 2
    err = capsys.readouterr().err
    assert text in err and "hint: " in err


def test_a_missing_peer_is_said(tiny, tmp_path):
    spec = spec_of(PEER, tmp_path / "no.gguf", ModelConfig.load(tiny), TESTS, 1, 1, 0)
    with pytest.raises(UserError, match=r"llama\.cpp ended with") as error:
        compare.peer_turn(sys.executable, spec)
    assert "llama-cpp-python" in error.value.hint


def test_no_space_is_said(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SPARE_BYTES", 1 << 60)
    with pytest.raises(UserError, match="GB are free"):
        compare.write_gguf(sys.executable, tiny, tmp_path / "m.gguf", "q8_0")


def test_q4_0_is_our_int4():
    gguf = pytest.importorskip("gguf")
    from bench.to_gguf import q4_0

    w = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    ours = quantize_int4(w)
    theirs = gguf.quants.dequantize(q4_0(ours), gguf.GGMLQuantizationType.Q4_0)
    # bf16 scales of this size are exact in float16
    np.testing.assert_array_equal(theirs, dequantize(ours))


def test_packed_weights_become_the_same_gguf():
    pytest.importorskip("gguf")
    from bench.to_gguf import _bits, _natural, q4_0

    w = np.random.default_rng(0).standard_normal((20, 96)).astype(np.float32)
    int4, int8 = quantize_int4(w), quantize_int8(w)
    np.testing.assert_array_equal(q4_0(_natural(pack(int4))), q4_0(int4))
    np.testing.assert_array_equal(_bits(pack(int8)), f32_to_bf16(dequantize(int8)))


@pytest.mark.parametrize("trunk", ["q8_0", "bf16"])
def test_gguf_round_trip(tiny, tmp_path, trunk):
    gguf = pytest.importorskip("gguf")
    from bench.to_gguf import write

    path = tmp_path / "tiny.gguf"
    assert write(tiny, path, trunk) == path.stat().st_size
    reader = gguf.GGUFReader(path)
    config = ModelConfig.load(tiny)
    assert reader.fields["general.architecture"].contents() == "deepseek2"
    assert reader.fields["deepseek2.block_count"].contents() == config.num_hidden_layers
    assert reader.fields["deepseek2.attention.head_count_kv"].contents() == 1
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"

    found = {tensor.name: tensor for tensor in reader.tensors}

    def values(name: str) -> np.ndarray:
        tensor = found[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)

    checkpoint = Checkpoint.open(tiny)
    layer = config.first_k_dense_replace  # the first with experts
    heads, n_dim, rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    kv_b = dequantize(checkpoint.linear(f"model.layers.{layer}.self_attn.kv_b_proj"))
    kv_b = kv_b.reshape(heads, n_dim + config.v_head_dim, rank)
    expected = {
        "token_embd.weight": as_f32(checkpoint.tensor("model.embed_tokens.weight")),
        "output.weight": dequantize(checkpoint.linear("lm_head")),
        "output_norm.weight": as_f32(checkpoint.tensor("model.norm.weight")),
        "blk.0.ffn_down.weight": dequantize(checkpoint.linear("model.layers.0.mlp.down_proj")),
        f"blk.{layer}.attn_k_b.weight": kv_b[:, :n_dim].transpose(0, 2, 1),
        f"blk.{layer}.attn_v_b.weight": kv_b[:, n_dim:],
        f"blk.{layer}.ffn_gate_inp.weight": dequantize(
            checkpoint.linear(f"model.layers.{layer}.mlp.gate")
        ),
        f"blk.{layer}.ffn_up_exps.weight": np.stack(
            [dequantize(checkpoint.expert(layer, e)[1]) for e in range(config.n_routed_experts)]
        ),
    }
    for name, array in expected.items():
        np.testing.assert_allclose(
            values(name), array, rtol=2e-3, atol=np.abs(array).max() / 100, err_msg=name
        )
    weights = {name for name in checkpoint.names() if not name.endswith("weight_shape")}
    # kv_b became two; the experts of a projection one, and INT4's two arrays one.
    moe_layers = config.num_hidden_layers - layer
    experts = {name for name in weights if ".experts." in name}
    assert len(found) == len(weights - experts) + config.num_hidden_layers + 3 * moe_layers
