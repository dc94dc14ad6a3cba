"""Computing ahead while the user types: who has the session when."""

from __future__ import annotations

import threading

from kimi_cpu.cli.warmup import Warmup


class SlowSession:
    """`sync` waits for `go` before the second of two chunks."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.synced: list[list[int]] = []
        self.done: list[list[int]] = []

    def sync(self, ids, progress):
        self.synced.append(ids)
        self.begun.set()
        progress(1, 2)
        self.go.wait(20)
        progress(1, 2)
        self.done.append(ids)


def never() -> bool:
    return False


def test_a_beginning_of_the_prompt_is_computed_to_its_end():
    session = SlowSession()
    warmup = Warmup(session)
    warmup.start([1, 2])
    session.go.set()
    assert warmup.finish([1, 2, 3], never) and session.done == [[1, 2]]
    assert warmup.finish([1, 2, 3], never), "nothing to wait for"


def test_another_prompt_breaks_it_off():
    session = SlowSession()
    warmup = Warmup(session)
    warmup.start([1, 2])
    assert session.begun.wait(20)
    threading.Timer(0.05, session.go.set).start()
    assert warmup.finish([1, 3], never) and session.done == []


def test_ctrl_c_leaves_it_and_nothing_new_begins_meanwhile():
    session = SlowSession()
    warmup = Warmup(session)
    warmup.start([1, 2])
    assert session.begun.wait(20)
    assert not warmup.finish([1, 2, 3], lambda: True)
    warmup.start([4])
    assert session.synced == [[1, 2]]
    assert not warmup.abandon()
    session.go.set()
    assert warmup.finish([1, 2, 3], never) and session.done == []
    warmup.start([4])
    assert warmup.finish([4], never) and session.done == [[4]]
