"""bench/compare.py without its peers: the table, the records, and the GGUF file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import compare
from bench.compare import OURS, Turn, markdown, relative_error, spec_of, summarise
from kimi_cpu.benchmark.runner import Test
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import UserError
from kimi_cpu.kernels import bandwidth
from kimi_cpu.quant import as_f32, dequantize, quantize_int4
from kimi_cpu.store.checkpoint import Checkpoint
from tests.tiny import tiny_checkpoint

TESTS = [Test(8, 0), Test(0, 4, 6)]
PEER = "llama.cpp"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=1)


def turn(engine: str, seconds: float) -> Turn:
    return Turn(
        engine=engine,
        version="1",
        system="X = 1",
        seconds={test.name: [seconds, 2 * seconds] for test in TESTS},
        logits={test.name: [0.0, 1.0, 2.0] for test in TESTS},
        ceiling_fraction={test.name: 0.9 for test in TESTS} if engine == OURS else {},
    )


def test_table_of_ratios():
    turns = [turn(OURS, 1.0), turn(PEER, 2.0), turn(OURS, 1.0), turn(PEER, 2.0)]
    table = summarise(turns, TESTS)
    assert list(table) == ["pp8", "tg4 @ d6"]
    ours, theirs = table["pp8"][OURS], table["pp8"][PEER]
    assert ours["avg_ts"] == pytest.approx(6.0) and ours["samples"] == 4
    assert theirs["avg_ts"] == pytest.approx(3.0) and theirs["ratio"] == pytest.approx(2.0)
    text = markdown(table, turns, "q8_0")
    assert "| pp8 | 6.00 ± 2.31 (90% of memory) | 3.00 ± 1.15 (2.00 x) |" in text
    assert "- llama.cpp 1: X = 1; its logits differ from ours by 0.0%" in text


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


def test_our_own_turn_and_its_record(tiny, tmp_path, monkeypatch, capfd):
    """The whole program with this engine alone."""

    def run_here(command: list[str], cwd: Path, **options: object) -> SimpleNamespace:
        """What would be a process of its own."""
        if command[0] == "git":
            return SimpleNamespace(returncode=1, stdout="")
        assert command[1:3] == ["-m", "bench.compare"]
        return SimpleNamespace(returncode=compare.main(command[3:]))

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(bandwidth, "READ_BYTES", 64 << 20)
    record = tmp_path / "results" / "here.jsonl"
    args = ["-m", str(tiny), "-p", "8", "-n", "2", "-d", "3", "-r", "1", "--rounds", "1"]
    code = compare.main([*args, "-t", "1", "--engines", OURS, "--results", str(record)])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "| tg2 @ d3 |" in out and "% of memory" in out
    [line] = record.read_text().splitlines()
    value = json.loads(line)
    assert set(value["table"]) == {"pp8 @ d3", "tg2 @ d3"}
    assert value["seconds"][0]["engine"] == OURS and value["commit"] == ""


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--engines", "vllm"], "unknown engine 'vllm'"),
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
