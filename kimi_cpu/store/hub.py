"""Checkpoints from a hub, with `huggingface_hub` (an extra): whole, or repacked shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_cpu.config import ModelConfig
from kimi_cpu.config.reader import load_json_object
from kimi_cpu.errors import CheckpointError, UsageError, UserError
from kimi_cpu.store.checkpoint import INDEX_NAME, MANIFEST_NAME, SINGLE_NAME, Checkpoint
from kimi_cpu.store.manifest import load_manifest
from kimi_cpu.store.repack.plan import Options
from kimi_cpu.store.repack.progress import Lock, Progress, sync_folder, write_atomically
from kimi_cpu.store.repack.run import (
    DISK_FULL,
    SPARE_BYTES,
    Plan,
    disk_error,
    free_bytes,
    is_copied,
    plan_repack,
)
from kimi_cpu.store.repack.source import Header, shard_names
from kimi_cpu.store.safetensors import header_length

_SAME_COMMAND = "What is complete is kept: the same command goes on from there."
#: Requests for headers at once.
_CONNECTIONS = 8
#: A first request gets so much of a shard: most headers as a whole.
_FIRST_BYTES = 1 << 20
#: Where the hub's client keeps what it knows of its downloads, in the folder it writes to.
_CLIENT_FOLDER = ".cache"


class Hub:
    """One repository at one commit.

    Attributes:
        repo: OWNER/NAME.
        commit: the commit that the revision meant when this was made.
        sizes: bytes of every file.
    """

    def __init__(self, repo: str, revision: str | None = None) -> None:
        """Ask the hub. Raises UsageError without `huggingface_hub`, UserError from the hub."""
        try:
            import huggingface_hub
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError:
            raise UsageError(
                "`kimi-cpu pull` needs huggingface_hub, which is not installed",
                "pip install 'kimi-cpu[hub]'; or download the folder with any other tool.",
            ) from None
        self._client: Any = huggingface_hub
        self.repo = repo
        info = self._ask(
            lambda: self._client.HfApi().model_info(repo, revision=revision, files_metadata=True)
        )
        self.commit = str(info.sha)
        self.sizes = {file.rfilename: int(file.size or 0) for file in info.siblings}

    def download(self, name: str, folder: Path) -> Path:
        """A file into a folder, going on where an earlier download of it stopped. UserError."""
        path: str = self._ask(
            lambda: self._client.hf_hub_download(
                self.repo, name, revision=self.commit, local_dir=folder
            )
        )
        return Path(path)

    def header(self, name: str) -> Header:
        """The header of a shard, without its data. Raises CheckpointError, UserError."""
        where = Path(self.repo) / name
        n_bytes = self.sizes[name]
        first = self._range(name, 0, min(n_bytes, _FIRST_BYTES))
        end = 8 + header_length(where, first[:8], n_bytes)
        rest = self._range(name, len(first), end) if end > len(first) else b""
        return Header((first + rest)[8:end], n_bytes)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file."""
        utils = self._client.utils

        def get() -> bytes:
            url = self._client.hf_hub_url(self.repo, name, revision=self.commit)
            headers = utils.build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}"}
            response = utils.get_session().get(url, headers=headers, timeout=60)
            utils.hf_raise_for_status(response)
            data: bytes = response.content
            return data

        data: bytes = self._ask(get)
        if len(data) != end - begin:
            raise UserError(
                f"{self.repo}: the hub gave {len(data)} bytes of {name} instead of {end - begin}",
                "It must answer requests for parts of files. Try again, or pull without --repack.",
            )
        return data

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer to a question to the hub, or a UserError that says why there is none."""
        errors = self._client.errors
        try:
            return question()
        except errors.GatedRepoError:
            problem, hint = "is gated", "Accept its terms on its page and log in (HF_TOKEN)."
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            problem = "there is no such repository"
            hint = "Name it OWNER/NAME; a private one needs HF_TOKEN."
        except errors.RevisionNotFoundError:
            problem, hint = "has no such revision", "Leave --revision out for the newest."
        except OSError as exc:
            if exc.errno in DISK_FULL:
                raise
            problem, hint = _one_line(exc), _SAME_COMMAND
        except Exception as exc:  # the client's own, and its HTTP library's: it has changed twice
            problem, hint = _one_line(exc), _SAME_COMMAND
        raise UserError(f"{self.repo}: {problem}", hint) from None


@dataclass(frozen=True)
class Pull:
    """A download that is planned: its small files are here, its weights are not.

    Attributes:
        hub: where it comes from.
        target: the folder to make.
        files: names of all weight files.
        needed_bytes: what the disk must have free to complete it.
        free_bytes: what it has.
    """

    hub: Hub
    target: Path
    files: list[str]
    needed_bytes: int
    free_bytes: int
    progress: Progress

    def run(self, on_file: Callable[[str], object] = lambda name: None) -> Path:
        """Download what is missing, check it, and give the folder its name; returns that.

        Args:
            on_file: told the name of each file before it is downloaded.

        Raises UserError: too little space, the network or the disk fails, files are no checkpoint.
        """
        if self.free_bytes < self.needed_bytes:
            raise UserError(
                f"{self.target}: needs {self.needed_bytes / 1e9:.1f} GB more on this disk, "
                f"{self.free_bytes / 1e9:.1f} GB are free",
                "Free space, choose another disk, or take less of it with --repack.",
            )
        folder = self.progress.folder
        lock = Lock(self.progress.work / "lock")
        try:
            for name in self.files:
                on_file(name)
                self.hub.download(name, folder)
            Checkpoint.open(folder).close()
        except OSError as exc:
            raise disk_error(exc, folder) from None
        finally:
            lock.release()
        shutil.rmtree(folder / _CLIENT_FOLDER, ignore_errors=True)
        self.progress.publish()
        return self.target


def plan_pull(repo: str, target: Path, revision: str | None = None) -> Pull:
    """Ask the hub, download the small files, and see whether the rest fits on the disk.

    Raises:
        UsageError: the target exists, or was begun in another way.
        ConfigError, CheckpointError: the repository holds no checkpoint that can be run.
        UserError: the hub, the network or the disk fails.
    """
    hub, progress = _begin(repo, target, revision, repack=False)
    folder = progress.folder
    files = _download_small(hub, folder)
    there = sum(
        path.stat().st_size
        for path in (*folder.glob("*.*"), *(folder / _CLIENT_FOLDER).rglob("*.incomplete"))
        if path.is_file() and (path.name in files or path.suffix == ".incomplete")
    )
    needed_bytes = sum(hub.sizes[name] for name in files) - there
    return Pull(hub, target, files, needed_bytes + SPARE_BYTES, free_bytes(target), progress)


class HubShards:
    """Shards that are downloaded when they are needed, and deleted when they are not any more."""

    frees = True

    def __init__(self, hub: Hub, headers: Mapping[str, Header]) -> None:
        self._hub = hub
        self._headers = headers

    def fetch(self, shard: Path) -> None:
        """Download it, unless it is there. UserError; OSError if the disk is full."""
        self._hub.download(shard.name, shard.parent)
        if Header.read(shard) != self._headers[shard.name]:
            raise UserError(
                f"{shard}: is not the file that the hub described",
                "Delete it and give the same command again.",
            )

    def release(self, shard: Path) -> None:
        """Delete it."""
        shard.unlink(missing_ok=True)


def plan_pull_and_repack(
    repo: str, target: Path, options: Options, revision: str | None = None
) -> tuple[Plan, HubShards]:
    """Ask the hub for everything but the data of the weights, and plan as `plan_repack` does.

    Carry it out with `repack(plan, shards)`. Raises what `plan_pull` and `plan_repack` raise.
    """
    hub, progress = _begin(repo, target, revision, repack=True)
    folder = progress.source_folder
    _download_small(hub, folder)
    names = shard_names(folder)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        headers = dict(
            zip(names, pool.map(lambda n: progress.header(n) or hub.header(n), names), strict=True)
        )
    plan = plan_repack(folder, target, options, frees=True, headers=headers)
    return plan, HubShards(hub, headers)


def _begin(repo: str, target: Path, revision: str | None, *, repack: bool) -> tuple[Hub, Progress]:
    """Open the repository, at the commit of an earlier run if there was one."""
    progress = Progress(target)
    path = progress.pin
    wanted = {"repo": repo, "revision": revision, "repack": repack}
    if path.exists():
        hint = f"Delete {progress.folder} to begin anew, or give the same command as before."
        pinned = load_json_object(path, UserError, hint)
        if {key: pinned.get(key) for key in wanted} != wanted:
            raise UsageError(f"{progress.folder}: was begun with another command", hint)
        return Hub(repo, str(pinned.get("commit"))), progress
    if progress.is_local:
        raise UsageError(
            f"{progress.folder}: was begun by `kimi-cpu repack`", "Give another destination."
        )
    hub = Hub(repo, revision)
    try:
        progress.work.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted | {"commit": hub.commit}).encode())
        sync_folder(progress.folder)
    except OSError as exc:
        raise disk_error(exc, progress.folder) from None
    return hub, progress


def _download_small(hub: Hub, folder: Path) -> list[str]:
    """Fetch everything but the weights; returns the weight files' names."""
    small = [name for name, n_bytes in hub.sizes.items() if is_copied(name, n_bytes)]
    small += [name for name in (INDEX_NAME, MANIFEST_NAME) if name in hub.sizes]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in small:
            if not (folder / name).exists():
                hub.download(name, folder)
    except OSError as exc:
        raise disk_error(exc, folder) from None
    ModelConfig.load(folder)  # before hundreds of gigabytes: can it be run?
    if MANIFEST_NAME in hub.sizes:
        manifest = load_manifest(folder)
        names = [file.name for file in (*manifest.expert_files, *manifest.trunk_files)]
    elif INDEX_NAME in hub.sizes or SINGLE_NAME in hub.sizes:
        names = shard_names(folder) if INDEX_NAME in hub.sizes else [SINGLE_NAME]
    else:
        raise CheckpointError(
            f"{hub.repo}: has neither {INDEX_NAME} nor {SINGLE_NAME}",
            "Name the repository of a checkpoint in safetensors format.",
        )
    for name in names:
        if name not in hub.sizes:
            raise CheckpointError(
                f"{hub.repo}: {name} is missing there", "The repository is incomplete."
            )
    return names


def _one_line(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    return (text or type(exc).__name__)[:200]
