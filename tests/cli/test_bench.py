"""`kimi-cpu bench` on a tiny checkpoint: formats, rows, traces, ceilings, refusals."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kimi_cpu.benchmark import pagecache, runner
from kimi_cpu.benchmark.runner import Bench, Test, trace
from kimi_cpu.benchmark.traffic import PARTS, ExpertCounter, ObservedKernels
from kimi_cpu.cli import bench_report
from kimi_cpu.cli.main import main
from kimi_cpu.engine import PREFILL_CHUNK, Engine
from kimi_cpu.errors import UsageError
from kimi_cpu.kernels import bandwidth
from tests.tiny import tiny_checkpoint

SMALL = 64 << 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch) -> None:
    """A reader of 64 MB: the numbers are not judged here."""
    monkeypatch.setattr(bandwidth, "READ_BYTES", SMALL)


@pytest.fixture
def bench(tiny, capsys):
    """bench(*args) -> (exit code, out, err) with one thread, and tests unless given."""

    def run(*args: str) -> tuple[int, str, str]:
        code = main(["bench", "-m", str(tiny), "-t", "1", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_markdown(bench):
    code, out, err = bench("-p", "8", "-n", "3", "-pg", "4,2", "-d", "0,5", "-r", "2", "--profile")
    assert code == 0, err
    lines = out.splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines[:8]]
    tests = [row[head.index("test")] for row in rows]
    names = ["pp8", "tg3", "pp4+tg2"]
    assert tests == [*names, *(f"{name} @ d5" for name in names)]
    assert len({len(line) for line in lines[:8]}) == 1, "the table's columns do not line up"
    assert "±" in lines[2] and "GB/s" in out and "experts" in out
    assert "caches" in err


def test_json_rows(bench):
    code, out, _ = bench("-p", "8", "-n", "4", "-d", "6", "-r", "3", "-o", "json")
    assert code == 0
    rows = json.loads(out)
    assert [row["test"] for row in rows] == ["pp8 @ d6", "tg4 @ d6"]
    for row in rows:
        assert len(row["samples_ts"]) == len(row["samples_ns"]) == 3
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(np.std(row["samples_ts"], ddof=1))
        assert len(row["ceiling_samples_bytes_per_s"]) == 4
        assert 1e8 < row["ceiling_bytes_per_s"] < 1e13
        assert row["ceiling_ts"] * row["bytes_per_token"] == pytest.approx(
            row["ceiling_bytes_per_s"]
        )
        assert row["ceiling_fraction"] == pytest.approx(row["avg_ts"] / row["ceiling_ts"])
        assert row["n_threads"] == 1 and row["profile_ms"] is None


def test_csv_and_jsonl_have_the_same_fields(bench):
    _, lines, _ = bench("-p", "4", "-n", "2", "-r", "1", "-o", "jsonl", "--profile")
    records = [json.loads(line) for line in lines.splitlines()]
    assert [r["test"] for r in records] == ["pp4", "tg2"]
    assert all(r["stddev_ts"] == 0 and set(r["profile_ms"]) == set(PARTS) for r in records)
    _, text, _ = bench("-p", "4", "-n", "2", "-r", "1", "-o", "csv", "--profile")
    table = list(csv.DictReader(io.StringIO(text)))
    assert [r["test"] for r in table] == ["pp4", "tg2"]
    missing = set(records[0]) - set(table[0])
    assert missing == {"profile_ms", "part_bytes_per_token"}
    assert float(table[0]["shared_experts_ms"]) > 0
    assert float(table[0]["head_bytes_per_token"]) > 0
    assert len(json.loads(table[0]["samples_ns"])) == 1


def test_nano_is_the_default(monkeypatch, capsys):
    monkeypatch.delenv("KIMI_CPU_MODEL", raising=False)
    assert main(["bench", "-p", "0", "-n", "2", "-r", "1", "-o", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == "tg2"


@pytest.mark.parametrize(
    "args",
    [
        ["-p", "x"],
        ["-p", "-1"],
        ["-n", "1,,2"],
        ["-t", "0"],
        ["-pg", "5"],
        ["-pg", "0,5"],
        ["-p", "0", "-n", "0"],
        ["-d", "100000000"],
        ["-r", "0"],
        ["-o", "xml"],
        ["--precision", "double"],
        ["--seed", "-1"],
        ["--plot", "x.gif"],
        ["--plot", "no/such/folder/x.svg"],
    ],
    ids=" ".join,
)
def test_wrong_options_exit_2(bench, args):
    code, out, err = bench(*args)
    assert code == 2 and not out and err.startswith("error: ") and "hint: " in err


def test_names_and_passes():
    assert Test(512, 0).name == "pp512" and Test(0, 128, 4096).name == "tg128 @ d4096"
    test = Test(PREFILL_CHUNK + 3, 2, 10)
    assert test.name == f"pp{PREFILL_CHUNK + 3}+tg2 @ d10"
    end = 10 + PREFILL_CHUNK + 3
    assert test.passes() == [
        (10, PREFILL_CHUNK), (10 + PREFILL_CHUNK, 3), (end, 1), (end + 1, 1),
    ]  # fmt: skip
    assert sum(n for _, n in test.passes()) == test.n_tokens and test.end == end + 2


def test_traces_depend_on_the_seed_alone():
    one = trace(1000, 50, 7)
    assert (one == trace(1000, 50, 7)).all() and (one[:20] == trace(1000, 20, 7)).all()
    assert (one != trace(1000, 50, 8)).any()
    assert one.min() >= 0 and one.max() < 1000


def test_the_engine_gets_exactly_the_trace(tiny):
    with Engine.load(tiny, threads=1) as engine:
        session = engine.session()
        ids = trace(engine.config.vocab_size, 9, 0)
        session.sync(ids[:3].tolist())
        assert runner.run_test(session, Test(4, 2, 3), ids) > 0
        assert session.tokens == tuple(ids.tolist())


def make_bench(folder: Path, **changes) -> Bench:
    options = {
        "precision": "fast", "seed": 0, "repetitions": 1, "cold": False, "profile": False,
        "read_bytes": SMALL, "progress": lambda text, complete: None,
    }  # fmt: skip
    return Bench(folder, **(options | changes))


def test_bytes_of_a_decoded_token(tiny):
    bench = make_bench(tiny)
    [row] = bench.run([Test(0, 3, 4)], [1])
    summary, config = bench.summary, bench.config
    # One token chooses K different experts in each layer that has experts.
    assert row.traffic.experts_per_pass == config.num_experts_per_tok
    assert row.traffic.expert_bytes == summary.token_expert_bytes
    assert row.traffic.trunk_bytes == summary.token_trunk_bytes
    assert sum(row.traffic.part_bytes.values()) == pytest.approx(row.traffic.total_bytes)
    assert row.traffic.cache_bytes == summary.kv_token_bytes * (5 + 6 + 7) / 3


def test_bytes_of_a_prompt(tiny):
    bench = make_bench(tiny, precision="exact")
    [row] = bench.run([Test(12, 0)], [1])
    config, per_pass = bench.config, row.traffic.experts_per_pass
    assert config.num_experts_per_tok < per_pass <= config.n_routed_experts
    assert row.traffic.total_bytes < bench.summary.total_bytes
    assert row.traffic.cache_bytes == bench.summary.kv_token_bytes
    assert row.traffic.trunk_bytes < bench.summary.token_trunk_bytes / 11


def test_profile_adds_up(tiny):
    bench = make_bench(tiny, profile=True)
    [row] = bench.run([Test(0, 4)], [1])
    assert row.profile is not None and set(row.profile) == set(PARTS)
    assert all(seconds >= 0 for seconds in row.profile.values())
    for part in ("attention", "router", "experts", "shared experts", "dense MLP", "head"):
        assert row.profile[part] > 0, part


def test_observed_kernels_pass_everything_on():
    calls = []
    kernels = SimpleNamespace(__name__="k", VARIANT="v", request=lambda table, ids: table)
    observed = ObservedKernels(kernels, lambda *call: calls.append(call))
    ids = np.array([[1, 2], [2, 1]])
    assert observed.VARIANT == "v" and observed.request(5, ids) == 5
    counter = ExpertCounter()
    for call in calls:
        counter(*call)
    assert calls[0][:2] == ("request", (5, ids)) and counter.touched == 2


def test_progress_counts_every_step(tiny):
    done = []
    bench = make_bench(
        tiny, repetitions=2, progress=lambda text, complete: done.append((text, complete))
    )
    tests = [Test(4, 0), Test(0, 2)]
    assert len(list(bench.run(tests, [1, 2]))) == 4
    assert sum(complete for _, complete in done) == runner.count_steps(2, 2, 2) == 4 * 3
    assert done[0] == ("pp4, 1 thread: warm-up", False)


def test_cold(bench, tiny):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("needs Linux")
    code, out, err = bench("-p", "0", "-n", "2", "-r", "2", "--cold", "-o", "jsonl")
    if code:  # a memory file system: said, not measured
        assert "stay in memory" in err
        return
    row = json.loads(out)
    assert row["cache"] == "cold" and len(row["samples_ts"]) == 2
    assert row["disk_bytes_per_token"] is None or row["disk_bytes_per_token"] >= 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_cold_lets_go_of_the_files(tiny):
    """Files that are still mapped would stay in memory; two models and a session had them."""
    bench = make_bench(tiny, cold=True, repetitions=1, profile=True)
    list(bench.run([Test(3, 2)], [1]))
    bench._forget()
    weights = [path.name for path in Path(tiny).glob("*.safetensors")]
    maps = Path("/proc/self/maps").read_text()
    # the checkpoint is open again; only that map may be there
    assert weights and all(maps.count(str(tiny / name)) <= 1 for name in weights)


def test_cold_says_where_it_cannot_work(bench, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    code, _, err = bench("-p", "0", "-n", "1", "-r", "1", "--cold")
    assert code == 2 and "posix_fadvise" in err and "--cold" in err


def test_cold_refuses_files_that_stay(tiny, monkeypatch):
    monkeypatch.setattr(pagecache, "drop", lambda files: None)
    monkeypatch.setattr(pagecache, "cached_fraction", lambda files: 0.8)
    with pytest.raises(UsageError, match="80% of the weight files stay in memory"):
        list(make_bench(tiny, cold=True).run([Test(0, 1)], [1]))


def test_cached_fraction(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    fraction = pagecache.cached_fraction([path])
    assert fraction is None or fraction > 0.9
    assert pagecache.cached_fraction([]) is None


def test_readers_read_everything():
    reader = bandwidth.DramReader(SMALL)
    assert reader.n_bytes == SMALL
    for threads in (1, 2):
        rates = reader.measure(threads)
        assert set(rates) == set(bandwidth.READERS)
        assert all(1e8 < rate < 1e13 for rate in rates.values())
    # What a reader leaves behind is the sum of first lanes: each stream contributed its part.
    sink = np.zeros(1, dtype=np.int32)
    data = np.arange(bandwidth.BLOCK_BYTES // 4, dtype=np.int32)
    for number, streams in zip(range(len(bandwidth.READERS)), (1, 4, 8, 8), strict=True):
        lanes = data.reshape(streams, -1, 16)[:, :, 0]
        total = int(np.add.reduce(lanes, axis=None, dtype=np.int32))
        args = (number, data.ctypes.data, bandwidth.BLOCK_BYTES, sink.ctypes.data, 0, 1)
        bandwidth._read_blocks(*args)
        assert sink[0] == total
        sink[0] = 0


def test_plot(bench, tmp_path):
    pytest.importorskip("matplotlib")
    for suffix, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / f"bench.{suffix}"
        code, _, err = bench("-p", "4", "-n", "2", "-d", "0,8", "-r", "2", "--plot", str(path))
        assert code == 0 and str(path) in err
        assert path.read_bytes().startswith(magic)


def test_plot_without_matplotlib(bench, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    code, _, err = bench("--plot", "x.svg")
    assert code == 2 and "kimi-cpu[plot]" in err


def test_markdown_of_any_size_lines_up():
    value = {
        "model_size": 594e9, "model_n_params": 1.03e12, "n_threads": 64, "test": "tg128 @ d4096",
        "avg_ts": 1.234, "stddev_ts": 0.01, "bytes_per_token": 17.2e9,
        "disk_bytes_per_token": None, "ceiling_ts": 1.5, "ceiling_fraction": 0.82,
    }  # fmt: skip
    line = bench_report.md_row(value, "Kimi-K2-Thinking")
    assert len(line) == len(bench_report.md_header().splitlines()[0])
    assert "1.23 ± 0.01" in line and " ? |" in line and "82%" in line
