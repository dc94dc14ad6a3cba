"""An engine whose experts do not all fit: the same tokens, within the budget, and told apart."""

from __future__ import annotations

import ctypes
import gc
import mmap
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu import model as model_module
from kimi_cpu.engine import Engine, Session
from kimi_cpu.errors import CheckpointError, LowMemoryError, UsageError
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts import budget as budget_module
from kimi_cpu.store.experts import system
from kimi_cpu.store.experts.simulation import read_trace
from kimi_cpu.store.repack import Options, plan_repack, repack
from tests.store.experts.shelf import budget_of
from tests.tiny import tiny_checkpoint

TOP_K, EXPERTS, LAYERS = 4, 16, 3  # layers with experts
PROMPT, STEPS = 150, 40


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_checkpoint(
        folder, 31, num_hidden_layers=4, hidden_size=128, moe_intermediate_size=512,
        max_position_embeddings=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    repack(plan_repack(published, folder, Options()))
    return folder


def budget_of_slot(folder: Path) -> int:
    """Bytes of an expert's slot."""
    checkpoint = Checkpoint.open(folder)
    slot_bytes = budget_of(checkpoint, 1).slot_bytes
    checkpoint.close()
    return slot_bytes


def memory_for(folder: Path, slots: int, latents: bool = True) -> int:
    """Bytes that hold so many experts beside everything else of these tests."""
    with_checkpoint = Checkpoint.open(folder)
    total = budget_of(with_checkpoint, slots).total_bytes
    with_checkpoint.close()
    return total + (ROOM if latents else 0)


#: For the latents of 256 tokens and the activations of the prompt.
ROOM = 1 << 20


def play(engine: Engine) -> tuple[list[int], list[np.ndarray]]:
    """A prompt, then greedy tokens with a detour; all logits."""
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, engine.config.vocab_size, PROMPT).tolist()
    session = engine.session()
    logits = session.sync(prompt)
    tokens, rows = [], [logits.copy()]
    for step in range(STEPS):
        token = int(np.argmax(logits))
        if step % 7 == 3:  # keep the routing moving
            token = int(rng.integers(0, engine.config.vocab_size))
        tokens.append(token)
        logits = session.step(token)
        rows.append(logits.copy())
    rows.append(engine.session().sync(prompt[:20]).copy())
    return tokens, rows


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("layout", ["published", "packed"])
def test_same_tokens_whatever_the_memory(
    layout: str, precision: str, published: Path, packed: Path
) -> None:
    folder = published if layout == "published" else packed
    with Engine.load(folder, precision=precision, threads=1) as engine:  # type: ignore[arg-type]
        assert not engine.experts.bounded
        tokens, rows = play(engine)
    tight = {"memory": memory_for(folder, 0)}
    for options in (
        {"io": "mmap", "threads": 2},
        {"io": "direct", "threads": 2},
        {**tight, "io": "mmap", "threads": 1},
        {**tight, "io": "direct", "threads": 2},
        {"memory": memory_for(folder, 20), "io": "direct", "threads": 2, "lookahead": False},
        {"memory": memory_for(folder, 20), "io": "mmap", "threads": 1},
        {"memory": memory_for(folder, 30), "io": "direct", "threads": 1},
    ):
        with Engine.load(folder, precision=precision, **options) as engine:  # type: ignore[arg-type]
            ours, our_rows = play(engine)
            assert ours == tokens, options
            for row, expected in zip(our_rows, rows, strict=True):
                np.testing.assert_array_equal(row, expected)
            store = engine.experts
            assert store.bounded == ("memory" in options) and store.resident <= store.capacity


def test_one_layers_experts_are_enough(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least budget: the 4 experts of one token's layer, not one more."""
    with Engine.load(published, threads=1) as engine:
        tokens, rows = play(engine)
    for io in ("mmap", "direct"):
        memory = memory_for(published, TOP_K, latents=False) + (1 << 19)
        with Engine.load(published, threads=2, memory=memory, io=io) as engine:  # type: ignore[arg-type]
            monkeypatch.setattr(engine._model, "latent_bytes", lambda: 1 << 19)
            ours, our_rows = play(engine)
            assert engine.experts.capacity == TOP_K and ours == tokens
            np.testing.assert_array_equal(np.array(our_rows), np.array(rows))


def test_too_little_memory_is_told_with_the_numbers(published: Path) -> None:
    with pytest.raises(UsageError, match=r"--memory is .*at least .* is needed.*4 experts"):
        Engine.load(published, memory=memory_for(published, TOP_K - 1, latents=False))


def test_a_conversation_that_outgrows_memory(published: Path) -> None:
    """Latents take the experts' place until a token's do not fit any more; nothing is lost."""
    memory = memory_for(published, TOP_K + 6, latents=False)
    with Engine.load(published, memory=memory, io="direct", threads=1) as engine:
        session = engine.session()
        first = session.sync([1, 2, 3]).copy()
        sessions: list[Session] = []
        with pytest.raises(UsageError, match="for the conversation so far"):
            for _ in range(100):
                sessions.append(engine.session())
                sessions[-1].sync([1, 2, 3])
        assert len(sessions[-1]) == 0
        sessions.clear()
        session.rewind(1)
        np.testing.assert_array_equal(session.sync([1, 2, 3]), first)
        np.testing.assert_array_equal(engine.session().sync([1, 2, 3]), first)


def resident_bytes(memory: np.ndarray) -> int:
    """Of anonymous memory that begins at a page, the bytes that have pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = np.zeros(-(-memory.nbytes // mmap.PAGESIZE), dtype=np.uint8)
    failed = libc.mincore(
        ctypes.c_void_p(memory.ctypes.data),
        ctypes.c_size_t(memory.nbytes),
        ctypes.c_void_p(flags.ctypes.data),
    )
    assert not failed
    return int((flags & 1).sum()) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
def test_experts_and_latents_never_exceed_their_memory(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over hundreds of tokens, several conversations and a prompt, guesses included."""
    monkeypatch.setattr(system, "use_huge_pages", lambda address, length: None)  # count single ones
    memory = memory_for(published, TOP_K + 12, latents=False)
    rng = np.random.default_rng(2)
    with Engine.load(published, memory=memory, io="direct", threads=2) as engine:
        store, most = engine.experts, 0
        budget = store._budget
        slab: np.ndarray = store._backend._slab  # type: ignore[attr-defined]
        assert slab.nbytes <= budget.expert_bytes
        sessions = [engine.session()]
        for step in range(240):
            session = sessions[-1]
            if step == 220:
                session.sync(list(range(100)))
            elif step % 50 == 49 and len(sessions) < 4:
                sessions.append(engine.session())
            else:
                session.step(int(rng.integers(0, 200)))
            used = resident_bytes(slab) + engine._model.latent_bytes()
            assert used <= budget.expert_bytes, step
            most = max(most, used)
        capacity = store.capacity
        assert capacity < TOP_K + 12, "latents took none of the experts' slots"
        del session
        sessions.clear()
        engine.session().step(1)
        assert store.capacity > capacity
        assert store.stats().ahead > 0 and most > 0.8 * budget.expert_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_the_trunk_is_mapped_once(packed: Path, tmp_path: Path) -> None:
    """A second map would count it twice as resident. What is read of it is all of it."""
    folder = Path(shutil.copytree(packed, tmp_path / "model"))  # that no other engine has
    with Engine.load(folder, memory=memory_for(folder, 8), io="direct") as engine:
        trunk = engine.experts._trunk
        assert trunk is not None
        trunk.wait()
        (file,) = folder.glob("trunk-*")
        parts = Path("/proc/self/smaps").read_text().split("VmFlags")  # locking cuts the map
        mapped = [
            int(part.split("Rss:")[1].split()[0]) << 10 for part in parts if str(file) in part
        ]
        assert trunk.n_bytes <= sum(mapped) <= file.stat().st_size + mmap.PAGESIZE


def test_memory_set_aside_for_latents(published: Path) -> None:
    """Experts neither get it nor lose their place to what is kept in it."""
    slots = TOP_K + 6
    with Engine.load(published) as engine:
        block = engine._model._pool.block_bytes
    memory = memory_for(published, slots, latents=False) + 8 * block
    with Engine.load(published, memory=memory, latents=8 * block, threads=1) as engine:
        store = engine.experts
        assert store.latent_bytes == 8 * block and store.capacity == slots
        kept: list[Session] = []
        for _ in range(8):
            kept.append(engine.session())
            kept[-1].sync([1, 2, 3])
            assert store.capacity == slots
        kept.append(engine.session())
        kept[-1].sync([1, 2, 3])
        assert store.capacity < slots, "what is more than was set aside takes the experts' place"
    slot = budget_of_slot(published)
    with pytest.raises(
        UsageError, match=r"at least .* for what is kept \(--cache-memory\)"
    ) as told:
        Engine.load(published, memory=memory, latents=8 * block + (6 + 1) * slot)
    assert "smaller --cache-memory" in told.value.hint
    with Engine.load(published, memory=memory, latents=None) as engine:
        assert 0 < engine.experts.latent_bytes < memory // 10
        assert engine.experts.capacity >= TOP_K
    with Engine.load(published, memory=16 << 30, latents=None) as engine:
        assert engine.experts.latent_bytes == (16 << 30) // 10


def test_a_prompt_is_cut_where_memory_is_short(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps: list[int] = []
    original = model_module.Model.forward

    def forward(self, ids, *args, **named):
        sweeps.append(len(ids))
        return original(self, ids, *args, **named)

    monkeypatch.setattr(model_module.Model, "forward", forward)
    monkeypatch.setattr(model_module, "PASS_RESERVE", 40_000)
    prompt = [t % 200 for t in range(256)]  # whole blocks of the latent cache
    memory = memory_for(published, TOP_K + 4, latents=False)
    with Engine.load(published, memory=memory, io="direct", threads=1) as engine:
        short = engine.session().sync(prompt).copy()
        assert len(sweeps) >= 2 and sum(sweeps) == 256
        assert max(sweeps) * engine._model.token_bytes < 4 * budget_of_slot(published)
    sweeps.clear()
    with Engine.load(published, threads=1) as engine:
        whole = engine.session().sync(prompt)
    assert sweeps == [256]
    np.testing.assert_array_equal(short, whole)


@pytest.mark.parametrize("io", ["mmap", "direct"])
def test_each_expert_is_read_once_in_a_prompt(packed: Path, io: str) -> None:
    memory = memory_for(packed, 2 * TOP_K)
    with Engine.load(packed, memory=memory, io=io, threads=2) as engine:  # type: ignore[arg-type]
        store, total = engine.experts, LAYERS * EXPERTS
        assert store.capacity < total
        engine.session().sync(list(range(PROMPT)))
        stats = store.stats()
        assert stats.uses <= total
        least = stats.uses * store.expert_bytes
        padded = budget_of(engine._checkpoint, 1).slot_bytes * total
        assert least <= stats.read_bytes <= padded


def test_routing_is_recorded(published: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with Engine.load(published, trace=path, threads=2) as engine:
        tokens, _ = play(engine)
        trace, n_experts = read_trace(path)  # readable while it grows
        assert n_experts == EXPERTS
        # Of the two prompts the last tokens, which alone pass the last layer's experts.
        assert trace.shape == (1 + len(tokens) + 1, LAYERS, TOP_K)
        assert engine.experts.stats().tokens == PROMPT + len(tokens) + 20
    with pytest.raises(UsageError, match="cannot be written"):
        Engine.load(published, trace=tmp_path)


def test_of_a_prompt_the_last_token_is_recorded(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(published, trace=tmp_path / "trace", threads=1) as engine:
        kernels, chosen = engine._model.kernels, []
        route = kernels.route

        def noted(*args: object) -> object:
            chosen.append(route(*args)[0])
            return route(*args)

        monkeypatch.setattr(kernels, "route", noted)
        engine.session().sync(range(100))
        trace, _ = read_trace(tmp_path / "trace")
    assert [len(ids) for ids in chosen[:-1]] == [100] * (LAYERS - 1)
    np.testing.assert_array_equal(trace, np.stack([ids[-1:] for ids in chosen[-LAYERS:]], axis=1))


def test_statistics_of_a_bounded_engine(published: Path) -> None:
    """Uses and hits add up whether Python or compiled code counts them."""
    with Engine.load(published, memory=memory_for(published, 8), io="direct") as engine:
        session = engine.session()
        session.sync([1, 2, 3])
        before = engine.experts.stats()
        for token in range(30):
            session.step(token)
        now = engine.experts.stats() - before
        assert now.tokens == 30 and now.uses == 30 * LAYERS * TOP_K
        assert 0 < now.hits < now.uses and now.read_bytes > 0 and now.wait_s > 0
        assert now.ahead == 0 or now.ahead_hits <= now.ahead_used <= now.ahead


@pytest.mark.parametrize("io", ["mmap", "direct"])
def test_a_cut_off_file_is_told_and_the_session_survives(
    packed: Path, tmp_path: Path, io: str
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    memory = memory_for(folder, 8)
    with Engine.load(folder, memory=memory, io=io, threads=1) as engine:  # type: ignore[arg-type]
        session = engine.session()
        session.sync([1, 2, 3])
        (path,) = folder.glob("experts-*")
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(len(data) // 2)
        length = len(session)
        with pytest.raises(CheckpointError, match="cannot be read any more"):
            for token in range(60):
                session.step(token)
                length = len(session)
        assert len(session) == length
        path.write_bytes(data)
        session.step(7)
        assert len(session) == length + 1


def test_interrupts_lose_nothing(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at every place where a pass waits for the disk: the same logits as without."""
    with Engine.load(published, threads=1) as engine:
        plain = engine.session()
        want = [plain.step(token).copy() for token in range(60)]
    rng, interrupted = np.random.default_rng(0), 0
    memory = memory_for(published, 6)
    with Engine.load(published, memory=memory, io="direct", threads=2) as engine:
        reader = engine.experts._reader
        for name, original in [("wait", reader.wait), ("submit", reader.submit)]:

            def call(loads, original=original):
                nonlocal interrupted
                when = rng.integers(0, 12)
                if when == 0:
                    interrupted += 1
                    raise KeyboardInterrupt
                original(loads)
                if when == 1:
                    interrupted += 1
                    raise KeyboardInterrupt

            monkeypatch.setattr(reader, name, call)
        session = engine.session()
        got: list[np.ndarray] = []
        while len(got) < len(want):
            try:
                got.append(session.step(len(got)).copy())
            except KeyboardInterrupt:
                assert len(session) == len(got)
    np.testing.assert_array_equal(np.array(got), np.array(want))
    assert interrupted > 20


def test_everything_fits_by_default(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(published) as engine:
        assert not engine.experts.bounded and engine.experts.io == "mmap"
    monkeypatch.setattr(budget_module.hardware, "available_ram_bytes", lambda: 64 << 20)
    with pytest.raises(UsageError, match="memory that may be used now"):
        Engine.load(published)


def test_who_has_no_room_does_not_take_it_from_others(published: Path) -> None:
    """A pass that is refused leaves nothing reserved: timelines that need no new block go on."""
    memory = memory_for(published, TOP_K + 6, latents=False)
    with Engine.load(published, memory=memory, io="direct", threads=1) as engine:
        store, budget = engine.experts, engine.experts._budget
        block = engine._model._pool.block_bytes
        fits = (budget.expert_bytes - TOP_K * budget.slot_bytes) // block
        sessions = [engine.session() for _ in range(fits)]
        for session in sessions:
            session.sync([1, 2, 3])
        with pytest.raises(LowMemoryError):
            engine.session().sync([1, 2, 3])
        other = engine.session()
        with pytest.raises(LowMemoryError):
            other.sync([1, 2, 3])
        assert store.capacity >= TOP_K and other.cache_bytes == 0
        for session in sessions:
            session.step(4)


def test_a_closed_engine_keeps_no_memory(packed: Path) -> None:
    """Without waiting for the garbage collector: the next engine may need it."""
    gc.disable()
    try:
        with Engine.load(packed, memory=memory_for(packed, 20), io="direct", threads=2) as engine:
            engine.session().step(1)
            backend = weakref.ref(engine.experts._backend)
        del engine
        assert backend() is None
    finally:
        gc.enable()
