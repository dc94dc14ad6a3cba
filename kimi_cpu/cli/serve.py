"""`kimi-cpu serve`: the model over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from kimi_cpu.cli import common
from kimi_cpu.cli.terminal import note
from kimi_cpu.errors import UsageError

if TYPE_CHECKING:
    from kimi_cpu.server.settings import ServedModel
    from kimi_cpu.server.worker import State, Worker

API_KEY = "KIMI_CPU_API_KEY"
#: What may lie in --cache-dir unless --cache-bytes says: 120,000 tokens of Kimi K2.
CACHE_BYTES = 16 << 30
#: At the end, how long nothing is said, and how long a layer may take that reads its experts from a
#: slow disk: only between two does the inference thread see that it should end.
_SOON_S = 0.7
_LAYER_S = 10.0


@click.command(
    epilog="Clients use http://HOST:PORT/v1 as OpenAI's base URL. KIMI_CPU_API_KEY holds the key "
    "where others cannot read it off the command line."
)
@click.option("--model", "-m", metavar="PATH", help="Folder of a model in Hugging Face's layout.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", "-p", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N",
    help="Port to listen on; 0 takes a free one.",
)  # fmt: skip
@click.option("--api-key", metavar="KEY", help="What clients must send; needed beyond loopback.")
@click.option(
    "--cors-origin", multiple=True, metavar="ORIGIN", help="Web origin whose pages may ask, or *."
)
@click.option(
    "--parallel", type=click.IntRange(1, 256), default=8, show_default=True, metavar="N",
    help="Replies computed in turns.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(1, 100_000), default=64, show_default=True, metavar="N",
    help="Requests that may wait; further ones get 429.",
)  # fmt: skip
@common.store_options
@click.option(
    "--cache-memory", metavar="SIZE", callback=common.parsed_size,
    help="Of --memory, for what prompts and replies computed; default: a tenth.",
)  # fmt: skip
@click.option(
    "--cache-dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Keep there, too, what was computed, for when the server starts again.",
)  # fmt: skip
@click.option(
    "--cache-bytes", metavar="SIZE", callback=common.parsed_size,
    help="What may lie in --cache-dir; default: 16G.",
)  # fmt: skip
@common.trace_option
@click.option(
    "--log-prompts", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write to FILE the text of all prompts and replies, which no log holds otherwise.",
)  # fmt: skip
@click.option("--threads", "-t", type=int, metavar="N", help="CPU threads; default: all cores.")
@click.option(
    "--precision",
    type=click.Choice(["fast", "exact"]),
    default="fast",
    show_default=True,
    help="int8 activations, or float32 as the reference computes.",
)
def command(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    cors_origin: tuple[str, ...],
    parallel: int,
    queue: int,
    memory: int | None,
    io: str,
    cache_memory: int | None,
    cache_dir: Path | None,
    cache_bytes: int | None,
    trace: Path | None,
    log_prompts: Path | None,
    threads: int | None,
    precision: str,
) -> None:
    """Serve a model over HTTP, as OpenAI's API."""
    api_key = api_key or os.environ.get(API_KEY) or None
    server = _imported()
    if not server.is_loopback(host) and api_key is None:
        raise UsageError(
            f"{host} can be reached by others, and there is no API key",
            f"Set {API_KEY} (or --api-key), or listen on 127.0.0.1 only.",
        )
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise UsageError("the API key has characters that HTTP cannot carry", "Use ASCII only.")
    if cache_bytes is not None and cache_dir is None:
        raise UsageError("--cache-bytes without --cache-dir", "Give the folder to keep them in.")
    folder = common.model_folder(model)
    listening = _listen(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    settings = server.Settings(
        host=host,
        api_key=api_key,
        cors_origins=cors_origin,
        max_active=parallel,
        max_waiting=queue,
        cache_dir=cache_dir,
        log_prompts=log_prompts,
        cache_bytes=CACHE_BYTES if cache_bytes is None else cache_bytes,
    )
    _log_to_stderr()

    def load(phase: Callable[[str], None]) -> ServedModel:
        from kimi_cpu.server.ceiling import ceiling_tps
        from kimi_cpu.server.settings import ServedModel

        phase("weights")
        defaults = common.sampling_params(folder)
        loaded = common.load_model(
            folder, threads, precision, memory=memory, latents=cache_memory, io=io, trace=trace
        )
        phase("memory speed")
        engine = loaded.engine
        return ServedModel(
            loaded.name, engine, loaded.tokenizer, loaded.template, defaults,
            ceiling_tps(folder, engine.threads), engine.experts.latent_bytes,
        )  # fmt: skip

    def on_change(state: State) -> None:
        if state == "ready":
            note(f"kimi-cpu serve · {worker.model.name} · {url}/v1 · Ctrl-C stops")
        elif state == "stopping":
            seconds = f"{settings.shutdown_s:.0f} s"
            note(f"Stopping: replies may go on for {seconds}; Ctrl-C again ends them now.")
        elif state == "failed":
            running.should_exit = True

    metrics = server.Metrics()
    worker = server.Worker(load, settings, metrics, on_change)
    running = server.Running(worker, server.make_app(worker, settings, metrics), settings)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
            running.run(sockets=[listening])
    finally:
        listening.close()
        _end(worker, settings.save_s if cache_dir else 0.0)
    if worker.error is not None:
        raise worker.error


def _imported() -> ModuleType:
    """The server's parts, or how to install what they need."""
    try:
        from kimi_cpu.server import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("kimi_cpu"):
            raise
        raise UsageError(
            f"the server needs the package {error.name}, which is not installed",
            "pip install 'kimi-cpu[server]'",
        ) from None
    return run


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound and listening, so that a port in use is told before the model loads."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except socket.gaierror as error:
        raise UsageError(
            f"--host {host}: {error.strerror or error}", "Use an address of this machine."
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} of {host} is in use", "Take another: --port N, or 0 for a free one."
            ) from None
        raise UsageError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}",
            "Take another with --host and --port.",
        ) from None


def _log_to_stderr() -> None:
    """One line for each reply, and what goes wrong; never the text of a prompt."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: not _is_cancelled(record))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("kimi_cpu.server", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)


def _is_cancelled(record: logging.LogRecord) -> bool:
    """Whether it is the traceback of a request that the end of the server has cut off."""
    return record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)


def _end(worker: Worker, save_s: float) -> None:
    worker.abort()
    try:
        ended = worker.join(_SOON_S)
        if not ended and worker.state != "loading":
            if worker.state == "saving":
                note(f"Saving what was computed, {save_s:.0f} s at most; Ctrl-C leaves at once.")
            ended = worker.join(_LAYER_S + save_s)
            if not ended:
                note("The inference thread did not end in time.")
    except KeyboardInterrupt:  # who cannot wait for what is being saved
        ended = False
    if not ended:
        # Native code cannot be interrupted, and leaving under it could crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if worker.error else 0)
