"""Predictions: sizes against real checkpoints, rates against arithmetic, hit rates by replaying."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu import hardware
from kimi_cpu.errors import UsageError
from kimi_cpu.planning import machine as measuring
from kimi_cpu.planning import plan as planning
from kimi_cpu.planning import routing
from kimi_cpu.planning.advice import advise
from kimi_cpu.planning.machine import GEMM_TOKENS, Machine, Meter, probe_folder
from kimi_cpu.planning.plan import default_sizes, make_plan, subject_of
from kimi_cpu.planning.predict import GUESSED, OTHER, predict
from kimi_cpu.planning.shape import (
    KNOWN,
    Shape,
    known_config,
    shape_of_checkpoint,
    shape_of_config,
)
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.budget import default_memory, make_budget
from kimi_cpu.store.experts.policy import Frequency
from kimi_cpu.store.experts.simulation import Recorder, read_trace, simulate, zipf_trace
from kimi_cpu.store.repack import Options, plan_repack, repack
from kimi_cpu.store.summary import summarise
from tests.tiny import tiny_checkpoint

KINDS = ("float", "int4", "packed4", "packed8")
GB = 10**9


def machine(dram: float = 40e9, disk: float | None = 2e9, gemm: float = 400e9) -> Machine:
    """A made-up one whose kernels are as fast as memory."""
    return Machine(
        cpu="test", variant="test", threads=2, ram_bytes=64 << 30, available_bytes=32 << 30,
        dram=dram, dram_range=(dram, dram), gemv=dict.fromkeys(KINDS, dram),
        gemm=dict.fromkeys(KINDS, (gemm,) * len(GEMM_TOKENS)), disk=disk,
    )  # fmt: skip


@pytest.fixture(scope="module")
def k2() -> dict[str, Shape]:
    config = known_config("k2-thinking")
    return {form: shape_of_config(config, form) for form in ("published", "packed")}  # type: ignore[arg-type]


@pytest.mark.parametrize(("available", "used"), [(5 << 30, 4.5), (10 << 30, 9), (128 << 30, 127)])
def test_a_tenth_is_left_to_others_and_no_more_than_one_gb(monkeypatch, available, used) -> None:
    monkeypatch.setattr(hardware, "available_ram_bytes", lambda: available)
    assert default_memory() == used * (1 << 30)


def test_k2_is_what_its_files_are(k2) -> None:
    """The figures of the published files: 594 GB, 11.89 GB of experts and 21.1 GB of trunk."""
    config = known_config("k2-thinking")
    summary = summarise(config)
    assert 590 * GB < summary.total_bytes < 596 * GB
    published, packed = k2["published"], k2["packed"]
    assert published.token_expert_bytes / GB == pytest.approx(11.89, abs=0.01)
    assert published.trunk_bytes / GB == pytest.approx(21.1, abs=0.05)
    assert published.trunk_bytes == (
        summary.token_trunk_bytes - summary.trunk_parts["embedding"] // config.vocab_size
    )
    assert packed.trunk_bytes / GB == pytest.approx(11.2 * 17 / 16, abs=0.3)  # int8 and scales
    assert shape_of_config(config, "packed", "int4").trunk_bytes < 0.65 * packed.trunk_bytes
    assert shape_of_config(config, "packed", "bf16").trunk_bytes == published.trunk_bytes
    ops = sum(published.trunk_ops.values()) + 480 * published.expert_ops
    # 2 for each active parameter; the config's own count has the embedding's row besides.
    assert ops == pytest.approx(2 * summary.n_active_parameters, rel=0.001)


@pytest.mark.parametrize("trunk", ["int8", "int4", "bf16"])
def test_a_config_tells_what_repacking_will_write(tmp_path: Path, trunk: str) -> None:
    """The shape predicted from the config is that of the checkpoint repacked from it."""
    source = tiny_checkpoint(tmp_path / "a", hidden_size=96, q_lora_rank=40)
    repack(plan_repack(source, tmp_path / "b", Options(trunk=trunk)))
    published, packed = Checkpoint.open(source), Checkpoint.open(tmp_path / "b")
    for checkpoint, form in ((published, "published"), (packed, "packed")):
        stored = shape_of_checkpoint(checkpoint)
        planned = shape_of_config(checkpoint.config, form, trunk)  # type: ignore[arg-type]
        assert stored.trunk_bytes == make_budget(checkpoint, 1).trunk_bytes
        assert stored.trunk_kinds == planned.trunk_kinds
        assert (stored.expert_kind, stored.form) == (planned.expert_kind, planned.form)
        # `weight_shape`, 8 bytes a projection, may lie between.
        assert 0 <= stored.expert_bytes - planned.expert_bytes <= 24
        checkpoint.close()


def test_unquantised_experts_cannot_be_repacked(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, int4=False))
    shape = shape_of_checkpoint(checkpoint)
    assert shape.expert_kind == "float"
    assert shape_of_config(checkpoint.config, "published").expert_bytes == shape.expert_bytes
    with pytest.raises(UsageError, match="INT4"):
        shape_of_config(checkpoint.config, "packed")
    assert len(subject_of("x", tmp_path, checkpoint.config, checkpoint).shapes) == 1
    checkpoint.close()


def test_unknown_models() -> None:
    assert all(known_config(name) for name in KNOWN)
    with pytest.raises(UsageError, match="k3"):
        known_config("k3")


def test_floors_add_up(k2) -> None:
    """No hits: all experts from the disk. All hits: memory alone, as bytes over bandwidth."""
    shape, m = k2["packed"], machine()
    cold = predict(shape, m, routing.Given(0.0, shape.all_experts), 64 << 30, 1)
    assert cold.disk_bytes == shape.token_expert_bytes and cold.bound == "disk"
    assert cold.limit_tps == pytest.approx(2e9 / 11.89e9, rel=0.01)
    read_s = 480 * shape.expert_bytes / 2e9
    rest_s = (shape.trunk_bytes + 480 * shape.expert_bytes) / 40e9
    assert shape.shared_bytes == pytest.approx(3 * 7168 * 2048 * 17 / 16)
    attention = 7168 * (1536 + 576 + 8192) + 1536 * 64 * 192 + 512 * 64 * 256
    assert shape.attention_bytes == pytest.approx(attention * 17 / 16)
    meanwhile_s = 60 * (shape.shared_bytes + shape.attention_bytes) / 40e9
    expected_s = read_s - meanwhile_s + (1 + OTHER) * rest_s
    assert 1 / cold.expected_tps == pytest.approx(expected_s, rel=1e-3)
    # On a disk faster than memory not all can be guessed.
    quick = predict(shape, machine(disk=5e10), routing.Given(0.0, shape.all_experts), 64 << 30, 1)
    left_s = (1 - GUESSED) * 480 * shape.expert_bytes / 5e10 - 60 * shape.shared_bytes / 40e9
    assert left_s > 0.01
    assert 1 / quick.expected_tps == pytest.approx(left_s + (1 + OTHER) * rest_s, rel=1e-3)
    fast = predict(shape, machine(disk=1e13), routing.Given(0.0, shape.all_experts), 64 << 30, 1)
    assert 1 / fast.expected_tps == pytest.approx((1 + OTHER) * rest_s, rel=1e-3)
    warm = predict(shape, m, routing.Even(shape.all_experts), shape.whole_bytes + (1 << 20), 1)
    assert (warm.hit_rate, warm.disk_bytes, warm.bound, warm.share) == (1.0, 0, "memory", 1.0)
    bytes_read = shape.trunk_bytes + shape.token_expert_bytes
    assert warm.limit_tps == pytest.approx(40e9 / bytes_read, rel=0.01)
    assert warm.expected_tps == pytest.approx(warm.limit_tps / (1 + OTHER), rel=0.01)


def test_memory_is_divided_as_the_store_divides_it(k2) -> None:
    shape = k2["packed"]
    row = predict(shape, machine(), routing.Even(shape.all_experts), 20 << 30, 1, 1000)
    taken = row.trunk_bytes + row.reserve_bytes + 1000 * shape.latent_bytes
    assert 0 <= (20 << 30) - taken - row.slots * shape.slot_bytes < shape.slot_bytes
    assert row.share == row.slots / shape.all_experts


def test_below_the_floor_nothing_runs(k2) -> None:
    shape = k2["published"]
    assumed = routing.Even(shape.all_experts)
    floor = predict(shape, machine(), assumed, 1 << 30, 1).floor_bytes
    below, above = (predict(shape, machine(), assumed, floor + d, 1) for d in (-1, 0))
    assert not below.runs and below.expected_tps == below.limit_tps == 0
    assert above.runs and above.slots == shape.top_k


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(20 << 30, 700 << 30), min_size=2, max_size=6),
    disk=st.floats(0.1e9, 60e9), dram=st.floats(5e9, 500e9), prompt=st.integers(1, 20_000),
)  # fmt: skip
def test_more_memory_is_never_slower(k2, sizes, disk, dram, prompt) -> None:
    shape, m = k2["packed"], machine(dram, disk)
    assumed = routing.Even(shape.all_experts)
    rows = [predict(shape, m, assumed, n, prompt, prompt) for n in sorted(sizes)]
    for less, more in pairwise(rows):
        assert more.expected_tps >= less.expected_tps * (1 - 1e-9)
        assert more.limit_tps >= less.limit_tps
        assert more.prompt_s <= less.prompt_s + 1e-9
    for row in rows:
        assert row.expected_tps <= row.limit_tps * (1 + 1e-9)
        assert row.prompt_s == max(row.prompt_disk_s, row.prompt_compute_s)


def test_a_prompt_is_one_sweep(k2) -> None:
    """From some hundred tokens on the disk's part does not grow, up to a sweep's tokens."""
    shape, m = k2["packed"], machine()
    assumed = routing.Even(shape.all_experts)
    memory = predict(shape, m, assumed, 0, 1).floor_bytes

    def disk_s(n: int) -> float:
        return predict(shape, m, assumed, memory, n).prompt_disk_s

    sweep = (59 * 384 + 8) * shape.expert_bytes / 2e9  # of the last layer the last token's
    assert disk_s(1) == pytest.approx(480 * shape.expert_bytes / 2e9, rel=0.01)
    assert disk_s(8) < 0.2 * sweep
    assert disk_s(512) == pytest.approx(disk_s(8192), rel=0.001)
    assert disk_s(8192) == pytest.approx(sweep, rel=0.001)
    assert disk_s(8193) > disk_s(8192)
    one, two = (predict(shape, m, assumed, memory, n).prompt_compute_s for n in (1024, 2048))
    assert 1.95 < two / one < 2.2


def test_few_layers_stand_for_all(k2) -> None:
    """What is simulated on 12 of 24 layers hits as all of them do."""
    shape = replace(k2["packed"], n_moe_layers=24, n_experts=48, top_k=4)
    assumed = routing.made_up(shape)
    trace = zipf_trace(1024, 24, 48, 4)
    for share in (0.1, 0.3, 0.7):
        slots = int(share * shape.all_experts)
        full = simulate(trace, 48, slots, Frequency(24 * 48)).hit_rate_after(512)
        assert assumed.hit_rate(slots) == pytest.approx(full, abs=0.015)
    assert assumed.hit_rate(shape.all_experts) == 1.0


def test_even_choices_hit_what_is_there(k2) -> None:
    shape = replace(k2["packed"], n_moe_layers=8)
    assumed = routing.made_up(shape, skew=0.0, locality=0.0)
    for share in (0.2, 0.6):
        assert assumed.hit_rate(int(share * shape.all_experts)) == pytest.approx(share, abs=0.04)
    popular = routing.made_up(shape, skew=1.0, locality=0.5)
    assert popular.hit_rate(shape.all_experts // 5) > 0.6


def test_a_recorded_trace_is_replayed(tmp_path: Path) -> None:
    shape = replace(shape_of_config(known_config("k2-thinking"), "packed"), n_moe_layers=2)
    trace = zipf_trace(200, 2, 384, 8, seed=3)
    recorder = Recorder(tmp_path / "t", [1, 2], 384, 8)
    recorder.tokens(trace)
    recorder.close()
    replayed = routing.recorded(tmp_path / "t", shape)
    expected = simulate(trace, 384, 200, Frequency(768)).hit_rate_after(100)
    assert replayed.hit_rate(200) == expected > 0
    assert "200 tokens" in replayed.text and replayed.kind == "trace"
    with pytest.raises(UsageError, match="2 layers of 384 experts"):
        routing.recorded(tmp_path / "t", replace(shape, n_moe_layers=60))
    Recorder(tmp_path / "empty", [1, 2], 384, 8).close()
    with pytest.raises(UsageError, match="too few"):
        routing.recorded(tmp_path / "empty", shape)
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(UsageError, match="no trace"):
        routing.recorded(tmp_path / "bad", shape)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of file sizes")
def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    trace = zipf_trace(500, 2, 384, 8, seed=3)
    recorder = Recorder(tmp_path / "t", [1, 2], 384, 8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        for token in trace:
            recorder.tokens(token[None])
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    [record] = caplog.records
    assert "routing is recorded no further" in record.getMessage()
    kept, _ = read_trace(tmp_path / "t")
    assert 40 < len(kept) < 500
    np.testing.assert_array_equal(kept, trace[: len(kept)])


def test_advice_follows_the_bottleneck(k2) -> None:
    """A slow disk asks for another disk, slow memory for faster memory; all of it is computed."""
    config, shape = known_config("k2-thinking"), k2["packed"]
    assumed = routing.Even(shape.all_experts)

    def rate(shape, on, n):
        return predict(shape, on, assumed, n, 512)

    slow_disk = advise(shape, config, machine(disk=0.2e9), 20 << 30, rate, most=9)
    by_what = {a.what.split()[0] + a.what.split()[1]: a for a in slow_disk}
    disk = next(a for a in slow_disk if a.what.startswith("a disk"))
    assert disk.gain == pytest.approx(2, rel=0.1) and "0.4 GB/s" in disk.what
    assert not any(a.what.startswith("memory twice") for a in slow_disk), by_what
    everything = shape.whole_bytes + (1 << 30)
    slow_memory = advise(shape, config, machine(dram=5e9), everything, rate)
    assert slow_memory[0].what.startswith("memory twice")
    assert slow_memory[0].gain == pytest.approx(2, rel=0.05)
    assert not any("disk" in a.what or "memory:" in a.what for a in slow_memory)
    stuck = advise(shape, config, machine(), 8 << 30, rate)
    assert stuck and all(a.gain is None and a.tps > 0 for a in stuck)
    assert [a.tps for a in stuck] == sorted((a.tps for a in stuck), reverse=True)


def test_repacking_is_advised_where_it_helps(k2) -> None:
    config = known_config("k2-thinking")
    assumed = routing.Even(k2["published"].all_experts)

    def rate(shape, on, n):
        return predict(shape, on, assumed, n, 512)

    m = machine(disk=50e9)
    found = advise(k2["published"], config, m, 64 << 30, rate, most=9)
    repacked = next(a for a in found if a.what.startswith("repack it (int8"))
    assert repacked.tps == rate(k2["packed"], m, 64 << 30).expected_tps
    assert not any("int8" in a.what for a in advise(k2["packed"], config, m, 64 << 30, rate))


def test_default_sizes_span_what_can_be(k2) -> None:
    sizes = default_sizes(list(k2.values()))
    assert [n >> 30 for n in sizes] == [16, 32, 64, 128, 256, 512, 1024]


def test_a_disk_that_is_needed_must_be_known(k2) -> None:
    shape = k2["packed"]
    with pytest.raises(ValueError, match="disk"):
        predict(shape, machine(disk=None), routing.Even(shape.all_experts), 20 << 30, 1)


@pytest.fixture
def small(monkeypatch) -> None:
    """Measuring as ever, but on little memory: other tests run beside it."""
    monkeypatch.setattr(measuring, "_KIND_BYTES", 48 << 20)
    monkeypatch.setattr(planning, "_TURNS", 1)


def test_measuring_is_real(small) -> None:
    """Rates within what any machine has; threads as asked; the middle of all turns."""
    meter = Meter(["float", "packed4"], threads=1)
    for _ in range(3):
        meter.turn()
    found = meter.machine()
    assert 1e8 < found.dram_range[0] <= found.dram < 1e12
    assert set(found.gemv) == set(found.gemm) == {"float", "packed4"}
    for rate in (*found.gemv.values(), *found.gemm["float"], *found.gemm["packed4"]):
        assert 1e7 < rate < 1e14
    assert found.threads == 1 and found.disk is None and found.disk_speed is None
    low, high = (found.gemm_rate("packed4", n) for n in (1, 10**6))
    assert (low, high) == (found.gemm["packed4"][0], found.gemm["packed4"][-1])
    between = found.gemm_rate("packed4", 16)
    assert min(found.gemm["packed4"][:2]) <= between <= max(found.gemm["packed4"][:2])


def test_a_folder_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    config = known_config("k2-thinking")
    abandoned = tmp_path / ".kimi-cpu-probe-x"
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    speed = probe_folder(tmp_path, config, 1 << 20)
    assert speed.ceiling > 1e6 and speed.expert_bytes == 1 << 20
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="cannot be measured"):
        probe_folder(tmp_path / "gone", config, 1 << 20)


def test_a_full_disk_is_not_filled_further(tmp_path: Path, monkeypatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(UsageError, match=r"0\.0 GB are free"):
        probe_folder(tmp_path, known_config("k2-thinking"), 24 << 20)


def test_a_whole_plan_of_a_small_checkpoint(small, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(folder)
    subject = subject_of("tiny", folder, checkpoint.config, checkpoint)
    assert [shape.form for shape in subject.shapes] == ["published", "packed"]
    assumed = routing.Even(subject.shapes[0].all_experts)
    plan = make_plan(subject, assumed, [1 << 29, 1 << 30], prompt_tokens=64)
    checkpoint.close()
    assert plan.machine.disk == plan.machine.disk_speed.ceiling
    for form in plan.forms:
        assert [row.memory_bytes for row in form.rows] == [1 << 29, 1 << 30]
        assert not form.rows[0].runs and form.rows[1].share == 1.0
    value = plan.as_dict()
    assert value["memory_bytes"] == plan.memory_bytes > 0
    assert np.isclose(
        value["forms"][0]["rows"][1]["expected_tps"], plan.forms[0].rows[1].expected_tps
    )
