"""`kimi-cpu plan`: what it says of models that are here and of one that is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kimi_cpu import hardware
from kimi_cpu.cli.main import main
from kimi_cpu.planning import machine as measuring
from kimi_cpu.planning import plan as planning
from kimi_cpu.planning import routing
from kimi_cpu.store.experts.simulation import Recorder, zipf_trace
from tests.tiny import tiny_checkpoint

ROW = re.compile(r"[ *] +\d+\.\d[MGT] ")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Measuring as ever, but on little memory."""
    monkeypatch.setattr(measuring, "_KIND_BYTES", 32 << 20)
    monkeypatch.setattr(planning, "_TURNS", 1)
    monkeypatch.setattr(routing, "_TOKENS", 256)
    monkeypatch.delenv("KIMI_CPU_MODEL", raising=False)


@pytest.fixture
def plan(capsys):
    def run(*args: str) -> str:
        assert main(["plan", *args]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    def run(*args: str) -> str:
        assert main(["plan", *args]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and "Traceback" not in err
        return err

    return run


def with_memory(monkeypatch, tmp_path: Path, limit: int) -> None:
    """A cgroup with this limit on a machine of 512 GiB."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroup / "a").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/a\n")
    (proc / "meminfo").write_text(f"MemAvailable: {512 << 20} kB\n")
    (cgroup / "a/memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(hardware, "_PROC", proc)
    monkeypatch.setattr(hardware, "_CGROUP", cgroup)
    monkeypatch.setattr(hardware.os, "sysconf", lambda name: (512 << 30) if "PHYS" in name else 1)


def test_k2_without_any_weights(plan) -> None:
    out = plan("--disk", "3.5", "--memory", "8G,64G,640G")
    lines = out.splitlines()
    assert max(map(len, lines)) < 80
    assert lines[0].startswith("Kimi K2 Thinking ")
    rows = [line for line in lines if ROW.match(line)]
    assert [line.split()[0].strip("*") for line in rows if not line.startswith("*")] == [
        "8.0G", "64.0G", "640.0G",
    ]  # fmt: skip
    assert sum(line.startswith("*") for line in rows) == 1
    assert rows[0 if not rows[0].startswith("*") else 1].count("needs") == 2
    assert "100%  100%" in next(line for line in rows if "640.0G" in line)
    for words in ("3.50 GB/s (given)", "rank^-0.6", "assumed", "would help", "repacked"):
        assert words in out


def test_the_cgroups_limit_is_what_counts(plan, monkeypatch, tmp_path) -> None:
    with_memory(monkeypatch, tmp_path, 20 << 30)
    value = json.loads(plan("--disk", "2", "--json", "--memory", "20G"))
    assert value["machine"]["ram_bytes"] == 20 << 30
    assert value["memory_bytes"] == 19 << 30  # 1 GB is left to others
    published, packed = value["forms"]
    assert not published["here"]["runs"] and packed["here"]["runs"]
    assert "repacked" in value["verdict"] and "as published it would need" in (
        value["verdict"].lower()
    )


def test_below_the_floor_it_says_what_is_missing(plan, monkeypatch, tmp_path) -> None:
    with_memory(monkeypatch, tmp_path, 6 << 30)
    out = plan("--disk", "2", "--memory", "4G")
    floor = re.search(r"it needs at least ([\d.]+)G repacked or ([\d.]+)G", " ".join(out.split()))
    assert floor and 11 < float(floor[1]) < 14 < float(floor[2]) < 23
    assert "does not run here" in out and "5.4G may be used" in " ".join(out.split())


def test_json_adds_up(plan) -> None:
    value = json.loads(plan("--disk", "2", "--json", "--hit-rate", "0.5", "--prompt", "100"))
    assert value["assumption"] == {
        "kind": "given", "text": "a hit rate of 50% wherever not all experts fit, as given",
    }  # fmt: skip
    assert value["folder"] is None and value["prompt_tokens"] == 100
    for form in value["forms"]:
        shape = form["shape"]
        assert shape["trunk_bytes"] == sum(shape["trunk_kinds"].values())
        running = [row for row in form["rows"] if row["runs"]]
        assert running and running[-1]["share"] == 1
        for row in running:
            experts = shape["n_moe_layers"] * shape["top_k"] * shape["expert_bytes"]
            assert row["disk_bytes"] == pytest.approx((1 - row["hit_rate"]) * experts)
            assert row["disk_s"] == pytest.approx(row["disk_bytes"] / 2e9)
            assert row["limit_tps"] == pytest.approx(1 / max(row["disk_s"], row["dram_s"]))
            assert row["hit_rate"] == (1 if row["share"] == 1 else 0.5)
            assert row["expected_tps"] <= row["limit_tps"] * (1 + 1e-9)
        rates = [row["expected_tps"] for row in running]
        assert rates == sorted(rates)


def test_a_checkpoint_and_its_disk(plan, tiny) -> None:
    value = json.loads(plan(str(tiny), "--json"))
    assert value["folder"] == str(tiny)
    assert value["machine"]["disk"] == max(
        value["machine"]["disk_speed"]["mmap"], value["machine"]["disk_speed"]["direct"] or 0
    )
    assert [form["shape"]["form"] for form in value["forms"]] == ["published", "packed"]
    out = plan(str(tiny))
    assert "stays in the CPU's caches" in out and "all of it in memory" in " ".join(out.split())


def test_a_config_alone(plan, tiny, tmp_path) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    value = json.loads(plan(str(tmp_path), "--json", "--disk", "1"))
    assert value["model"] == tmp_path.name and value["folder"] is None
    assert not [p for p in tmp_path.iterdir() if p.name != "config.json"]


def test_a_recorded_trace(plan, fails, tiny, tmp_path) -> None:
    trace = tmp_path / "trace.jsonl"
    recorder = Recorder(trace, [1, 2], 16, 4)
    recorder.tokens(zipf_trace(50, 2, 16, 4))
    recorder.close()
    assert "the trace trace.jsonl, 50 tokens" in plan(str(tiny), "--trace", str(trace))
    assert "is of a model with 2 layers" in fails("--trace", str(trace))
    assert "exclude each other" in fails(str(tiny), "--trace", str(trace), "--hit-rate", "0.5")


def test_a_busy_machine_is_named(plan, monkeypatch) -> None:
    turns = iter([20e9, 8e9, 19e9])
    monkeypatch.setattr(measuring.DramReader, "measure", lambda self, threads: {"x": next(turns)})
    assert "varied 2.5-fold" in " ".join(plan("--disk", "2").split())
    steady = iter([20e9, 19e9, 19e9])
    monkeypatch.setattr(measuring.DramReader, "measure", lambda self, threads: {"x": next(steady)})
    assert "-fold" not in plan("--disk", "2")


def test_skew_and_locality_matter(plan) -> None:
    def rate(*args: str) -> float:
        out = plan("--disk", "2", "--json", "--memory", "128G", *args)
        return json.loads(out)["forms"][1]["rows"][0]["hit_rate"]

    even, usual = rate("--skew", "0", "--locality", "0"), rate()
    strong = rate("--skew", "1", "--locality", "0.5")
    assert even + 0.1 < usual < strong - 0.1
    assert even == pytest.approx(0.22, abs=0.04)


@pytest.mark.parametrize("args", [
    ("--memory", "lots"), ("--memory", ","), ("--memory", "0"), ("--memory", "-3G"),
    ("--disk", "0"), ("--disk", "nan"), ("--hit-rate", "1.5"), ("--skew", "x"), ("--skew", "nan"),
    ("--prompt", "0"), ("--model", "gpt-5"), ("--plot", "x.pdf"), ("/nowhere/at/all",),
    ("--trace", "/nowhere/trace"), ("--hit-rate", "0.5", "--skew", "1"),
])  # fmt: skip
def test_nonsense_is_refused_in_one_line(fails, args) -> None:
    assert len(fails(*args).splitlines()) <= 2


def test_a_file_or_half_a_checkpoint(fails, tiny, tmp_path) -> None:
    assert "is a file" in fails(str(tiny / "config.json"))
    shard = next(tiny.glob("*.safetensors"))
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    assert "no config.json" in fails(str(tmp_path))


def test_a_damaged_checkpoint(tiny, tmp_path, capsys) -> None:
    import shutil

    shutil.copytree(tiny, tmp_path / "m")
    shard = next((tmp_path / "m").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert main(["plan", str(tmp_path / "m")]) == 1
    assert shard.name in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(plan, tmp_path, suffix) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    plan("--disk", "2", "--plot", str(path))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in data
    assert len(data) > 10_000
