"""Servers on the nano model and on a scripted one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from kimi_cpu.cli import common
from kimi_cpu.server.settings import ServedModel
from tests.server.live import Live
from tests.server.scripted import scripted_model


def load_nano(phase: Callable[[str], None]) -> ServedModel:
    folder = common.embedded_model()
    loaded = common.load_model(folder, 2, "fast")
    defaults = common.sampling_params(folder)
    return ServedModel("nano", loaded.engine, loaded.tokenizer, loaded.template, defaults)


@pytest.fixture(scope="session")
def nano() -> Iterator[Live]:
    """A server on the embedded model, for everything that does not disturb others."""
    live = Live(load_nano).ready()
    yield live
    live.stop()


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server on the script of `tests.cli.fake`."""
    model = scripted_model(tmp_path_factory.mktemp("scripted"))
    live = Live(lambda phase: model).ready()
    yield live
    live.stop()


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., Live]]:
    """serve(script, settings=..., session_bytes=..., **engine) starts one for this test alone."""
    started: list[Live] = []

    def start(
        script: Callable[[str], str] | None = None,
        settings: dict[str, Any] | None = None,
        session_bytes: int = 1 << 30,
        **kw: Any,
    ) -> Live:
        extra = {} if script is None else {"script": script}
        model = scripted_model(tmp_path / str(len(started)), **extra, **kw)
        model = replace(model, session_bytes=session_bytes)
        live = Live(lambda phase: model, **(settings or {}))
        started.append(live)
        return live.ready()

    yield start
    for live in started:
        model = live.worker._model
        if model is not None:
            model.engine.gate.set()  # type: ignore[attr-defined]
        live.stop()
