"""Replies on disk: found again after a restart, bounded, and never trusted."""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
import zlib
from array import array
from pathlib import Path

import pytest

from kimi_cpu.server import replyfiles
from kimi_cpu.server.replyfiles import ReplyFiles
from tests.server.live import until
from tests.server.test_replay import HABITS, Agent, script

MODEL, KEY, OTHER = b"m" * 16, b"k" * 32, b"o" * 32
CALL = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGE = {
    "role": "assistant", "content": None, "reasoning_content": "Hm, ☂", "tool_calls": [CALL],
}  # fmt: skip


def replies_in(folder: Path, model: bytes = MODEL, n_vocab: int = 1000) -> ReplyFiles:
    return ReplyFiles(folder, model, n_vocab)


def written(folder: Path, key: bytes = KEY, turn: tuple[int, ...] = (1, 2, 999)) -> Path:
    """A folder with one reply in it; its file."""
    files = replies_in(folder)
    files.save(key, MESSAGE, array("I", turn))
    files.close()
    return folder / MODEL.hex() / "replies" / f"{key.hex()}.reply"


@pytest.mark.parametrize("habit", HABITS)
def test_a_conversation_goes_on_after_a_restart(serve, tmp_path, habit):
    kept = {"cache_dir": tmp_path / "cache"}
    agent = Agent(serve(script, settings=kept), habit)
    usages = [agent.turn()[0], agent.turn()[0]]
    agent.live.stop()
    agent.live = serve(script, settings=kept)
    usage, reason = agent.turn()
    assert reason == "stop"
    known = usages[-1]["prompt_tokens"] + usages[-1]["completion_tokens"] - 1
    assert usage["prompt_tokens_details"]["cached_tokens"] >= known


def test_written_and_read(tmp_path):
    path = written(tmp_path / "made")
    message, turn = replies_in(tmp_path / "made").load(KEY)
    assert message == MESSAGE and turn == array("I", (1, 2, 999))
    assert replies_in(tmp_path / "made").load(OTHER) is None
    assert not list(tmp_path.rglob("*.part"))
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    for plain in ({"role": "assistant", "content": "x"}, {"role": "assistant", "content": None}):
        files = replies_in(tmp_path)
        files.save(OTHER, plain, array("I"))
        files.close()
        assert replies_in(tmp_path).load(OTHER) == (plain, array("I"))


def whole(data: bytes) -> bytes:
    """The same with the right checksum."""
    check = zlib.crc32(data[68:], zlib.crc32(data[:64]))
    return data[:64] + struct.pack("<I", check) + data[68:]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: b"", "does not begin"),
        (lambda data: b"#!/bin/sh\n" + data, "does not begin"),
        (lambda data: data[:40], "does not begin"),
        (lambda data: data[:-1], "size"),
        (lambda data: data + b"x", "size"),
        (lambda data: data[:-1] + b"?", "checksum"),
        (lambda data: data[:70] + b"\x01" + data[71:], "checksum"),
        (lambda data: whole(data[:8] + b"n" * 16 + data[24:]), "another reply"),
        (lambda data: whole(data[:24] + OTHER + data[56:]), "another reply"),
        (lambda data: whole(data[:56] + b"\xff" * 4 + data[60:]), "size"),
        (lambda data: whole(data[:68] + b"\xe8\x03\0\0" + data[72:]), "token ids"),
        (lambda data: whole(data.replace(b"assistant", b"developer")), "message"),
        (lambda data: whole(data.replace(b'"id":', b'"io":')), "message"),
        (lambda data: whole(data.replace("☂".encode(), b"\xff\xfe\xfd")), "message"),
        (lambda data: whole(data[:80] + b"[" * (len(data) - 80)), "message"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_skipped_and_told(tmp_path, caplog, change, what):
    path = written(tmp_path)
    data = path.read_bytes()
    assert whole(data) == data
    path.write_bytes(change(data))
    files = replies_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert files.load(KEY) is None and files.load(KEY) is None
    (record,) = caplog.records
    assert str(path) in record.getMessage() and what in record.getMessage()
    files.save(KEY, MESSAGE, array("I", [7]))
    files.close()
    assert replies_in(tmp_path).load(KEY) == (MESSAGE, array("I", [7]))


def test_other_models_and_other_files_are_left_alone(tmp_path):
    path = written(tmp_path)
    notes = path.with_name("notes.txt")
    notes.write_text("mine")
    other = replies_in(tmp_path, b"x" * 16)
    assert other.load(KEY) is None
    other.close()
    assert notes.read_text() == "mine" and replies_in(tmp_path).load(KEY) is not None


def test_the_least_recently_used_go(tmp_path, monkeypatch):
    monkeypatch.setattr(replyfiles, "MAX_FILES", 20)
    old = replies_in(tmp_path, b"x" * 16)  # of another model: it counts, and goes first
    for n in range(10):
        old.save(bytes([n]) * 32, MESSAGE, array("I", [n]))
    old.close()
    for path in tmp_path.rglob("*.reply"):
        os.utime(path, (1e9, 1e9))
    files = replies_in(tmp_path)
    for n in range(30):
        files.save(bytes([n]) * 32, MESSAGE, array("I", [n]))
    files.close(20)
    assert 10 < len(list(tmp_path.rglob("*.reply"))) <= 20
    assert replies_in(tmp_path, b"x" * 16).load(bytes(32)) is None
    assert replies_in(tmp_path).load(bytes([29]) * 32) is not None


def test_the_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(replyfiles, "MAX_BYTES", 100_000)
    files = replies_in(tmp_path)
    for n in range(60):
        files.save(bytes([n]) * 32, MESSAGE, array("I", [n]) * 1000)
    files.close(20)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.reply")]
    assert len(sizes) > 10 and sum(sizes) <= 100_000


def test_what_was_never_finished_goes(tmp_path):
    folder = written(tmp_path).parent
    for name, age in (("a" * 32 + ".part", 1e9), ("b" * 32 + ".part", None), ("c.part", 1e9)):
        (folder / name).write_bytes(b"x")
        if age:
            os.utime(folder / name, (age, age))
    replies_in(tmp_path).close()
    assert sorted(path.name[0] for path in folder.glob("*.part")) == ["b", "c"]


def test_a_folder_that_cannot_be_written_is_told_once(serve, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    live = serve(script, settings={"cache_dir": tmp_path / "cache"})
    monkeypatch.setattr(ReplyFiles, "_write", full)
    agent = Agent(live, HABITS[-1])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            agent.turn()
        until(lambda: live.app.state.service._reply_files._queue.empty())
    told = [r.getMessage() for r in caplog.records if "cannot keep replies" in r.getMessage()]
    assert len(told) == 1 and "No space left" in told[0]


def test_the_files_hold_what_the_answers_were(serve, tmp_path):
    live = serve(script, settings={"cache_dir": tmp_path / "cache"})
    answer = live.chat("hi")["choices"][0]["message"]
    live.stop()
    (path,) = (tmp_path / "cache").rglob("*.reply")
    data = path.read_bytes()
    n_ids, n_text = struct.unpack_from("<II", data, 56)
    assert json.loads(data[68 + 4 * n_ids :]) == answer and len(data) == 68 + 4 * n_ids + n_text
