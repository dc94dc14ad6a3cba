"""Weight files that vanish while they are computed with: processes that really get SIGBUS."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.cli.common import embedded_model
from kimi_cpu.config import ModelConfig
from kimi_cpu.store import mapping
from kimi_cpu.store.checkpoint import INDEX_NAME
from kimi_cpu.store.mapping import MappedFile
from kimi_cpu.store.writer import write_safetensors
from tests.cli.conftest import ROOT
from tests.tiny import tiny_config, tiny_tensors

if sys.platform not in ("linux", "darwin"):
    pytest.skip("nothing is installed on this system", allow_module_level=True)
pexpect = pytest.importorskip("pexpect")

TRUNK, EXPERTS = (f"model-0000{i}-of-000002.safetensors" for i in (1, 2))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A random model whose trunk and experts lie in a file each."""
    folder, values = tmp_path / "tiny", tiny_config(hidden_size=128, moe_intermediate_size=128)
    folder.mkdir()
    tensors = list(tiny_tensors(ModelConfig.from_dict(values), seed=3))
    weight_map = {name: EXPERTS if ".mlp.experts." in name else TRUNK for name, _, _ in tensors}
    for file in (TRUNK, EXPERTS):
        write_safetensors(folder / file, [t for t in tensors if weight_map[t[0]] == file])
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_model(), tmp_path / "nano"))


def python(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def lines(path: Path) -> str:
    return (
        f"error: {path}: cannot be read any more (it became shorter, or its disk failed)\n"
        "hint: Check the disk and that nobody changes the checkpoint while it is used.\n"
    )


def without_compiling(stderr: str) -> str:
    """Without what is said where nothing has been compiled yet."""
    first, _, rest = stderr.partition("\n")
    return rest if first.startswith("Compiling the kernels") else stderr


#: A long prompt brings all experts of a layer into memory, and its last token four of the last one;
#: then the file is cut off between two layers.
ENGINE = """
import os, sys
from kimi_cpu.cli import common
from kimi_cpu.engine import Engine
folder, victim, backend, watched = sys.argv[1:]
if watched == "watched":
    common.watch_weight_files()
with Engine.load(folder, io="mmap", threads=2, backend=backend, memory=1 << 30) as engine:
    ids = [i % 256 for i in range(1000)]
    engine.session().sync(ids)
    assert engine.experts.resident == 16 + 4
    print("ready", flush=True)
    engine.session().sync(ids, lambda done, total: os.truncate(victim, 0))
"""


@pytest.mark.parametrize("backend", ["simd", "reference"])
@pytest.mark.parametrize("name", [TRUNK, EXPERTS])
def test_in_compiled_code_and_in_numpy(tiny: Path, name: str, backend: str) -> None:
    done = python(ENGINE, tiny, tiny / name, backend, "watched")
    assert (done.returncode, done.stdout, done.stderr) == (1, "ready\n", lines(tiny / name))


def test_a_program_of_its_own_is_left_alone(tiny: Path) -> None:
    done = python(ENGINE, tiny, tiny / TRUNK, "simd", "not watched")
    assert (done.returncode, done.stderr) == (-signal.SIGBUS, "")


#: The embedding is the first that a pass reads.
BETWEEN = """
import os, sys
from kimi_cpu.engine import Engine
from kimi_cpu.errors import CheckpointError
folder, victim = sys.argv[1:]
with Engine.load(folder, memory=1 << 30) as engine:
    session = engine.session()
    for run in (session.step, lambda token: session.sync([token] * 9)):
        run(1)
        data = open(victim, "rb").read()
        os.truncate(victim, 0)
        try:
            run(2)
        except CheckpointError as error:
            print(error)
        with open(victim, "r+b") as file:
            file.write(data)
        run(2)
"""


def test_between_two_passes_it_is_an_error_like_others(tiny: Path) -> None:
    done = python(BETWEEN, tiny, tiny / TRUNK)
    told = f"{tiny / TRUNK}: cannot be read any more (it is shorter than it was)\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, 2 * told, "")


#: The command line; the file is cut off behind the back of the check before the Nth pass.
COMMAND = """
import os, sys, termios, time
from kimi_cpu.cli.main import main
from kimi_cpu.store.checkpoint import Checkpoint
victim, passes, *args = sys.argv[1:]
check, left = Checkpoint.check_files, int(passes)
def cut_off(checkpoint):
    global left
    check(checkpoint)
    left -= 1
    if args[0] == "chat":  # wait until the editor has drawn its line
        while termios.tcgetattr(0)[3] & termios.ICANON:
            time.sleep(0.01)
        time.sleep(0.5)
    if left == 0:
        os.truncate(victim, 0)
Checkpoint.check_files = cut_off
sys.exit(main(args))
"""


def test_run(nano: Path) -> None:
    path = nano / "model-00001-of-000002.safetensors"
    args = ("--model", nano, "--temp", "0", "--io", "mmap", "--memory", "1G")
    done = python(COMMAND, path, 10, "run", *args, "What is 17 + 25?")
    assert (done.returncode, without_compiling(done.stderr)) == (1, lines(path))


def test_bench(nano: Path) -> None:
    path = nano / "model-00002-of-000002.safetensors"
    args = ("--model", nano, "-p", "0", "-n", "8", "-r", "1", "--memory", "1G")
    done = python(COMMAND, path, 3, "bench", *args)
    assert (done.returncode, without_compiling(done.stderr)) == (1, lines(path))


def test_the_editors_terminal_is_restored(nano: Path, home: Path) -> None:
    """It happens while the beginning of the next prompt is computed and a person types."""
    path = nano / "model-00001-of-000002.safetensors"
    args = ["chat", "--model", str(nano), "--memory", "1G"]
    code = [sys.executable, "-c", COMMAND, str(path), "1", *args]
    shell = f'stty -a > {home}1; "$@"; echo code $?; stty -a > {home}2'
    child = pexpect.spawn(
        "/bin/sh", ["-c", shell, "sh", *code], cwd=str(ROOT), env=os.environ | {"NO_COLOR": "1"},
        encoding="utf-8", timeout=300, dimensions=(24, 400),
    )  # fmt: skip
    child.expect("code 1\r\n")
    assert child.before.endswith("\x1b[?2004l\r\n" + lines(path).replace("\n", "\r\n"))
    child.expect(pexpect.EOF)
    child.close()
    before, after = (Path(f"{home}{i}").read_text() for i in (1, 2))
    assert "icanon" in before and after == before


#: Something else that a program may do about bus errors, and then one that is not ours.
FOREIGN = """
import faulthandler, mmap, os, signal, sys
from kimi_cpu import bus_error
folder, what = sys.argv[1:]
if what == "faulthandler":
    faulthandler.enable()
if what == "own":
    signal.signal(signal.SIGBUS, lambda *_: (print("own", flush=True), os._exit(7)))
print(bus_error.install(lambda error: b"ours"), flush=True)
from kimi_cpu.engine import Engine
with Engine.load(folder, memory=1 << 30) as engine, open(folder + "/foreign", "w+b") as file:
    file.write(b"x" * 100_000)
    file.flush()
    foreign = mmap.mmap(file.fileno(), 0)
    if what in ("killed", "own"):
        os.kill(os.getpid(), signal.SIGBUS)
    else:
        file.truncate(0)
        foreign[50_000]
"""


@pytest.mark.parametrize(
    ("what", "stdout", "stderr", "code"),
    [
        ("nothing", "True\n", "", -signal.SIGBUS),
        ("killed", "True\n", "", -signal.SIGBUS),
        ("own", "False\nown\n", "", 7),
        ("faulthandler", "False\n", "Fatal Python error: Bus error", -signal.SIGBUS),
    ],
)
def test_bus_errors_of_others(tiny: Path, what: str, stdout: str, stderr: str, code: int) -> None:
    done = python(FOREIGN, tiny, what)
    assert (done.returncode, done.stdout) == (code, stdout)
    assert done.stderr.startswith(stderr) if stderr else not done.stderr


def test_maps_are_forgotten_with_their_last_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kimi_cpu import bus_error

    monkeypatch.setattr(mapping, "on_map", lambda path, *where: bus_error.watch(*where, b"text"))
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 10_000)
    file = MappedFile(path, 1, "hint")
    view = file.whole()
    address = view.ctypes.data

    def watched() -> list[list[int]]:
        return [row[:2].tolist() for row in bus_error._rows if row[0] <= address < row[1]]

    end = address + -(-10_000 // mmap.PAGESIZE) * mmap.PAGESIZE
    assert watched() == [[address, end]]
    file.close()
    assert watched() and view[9_999] == ord("x")
    del view
    assert not watched()
    other = MappedFile(path, 1, "hint")  # without views
    free = len(bus_error._free)
    other.close()
    assert len(bus_error._free) == free + 1
    bus_error._free[:], rows = [], bus_error._free[:]
    try:  # more files than the table has rows
        MappedFile(path, 1, "hint").close()
    finally:
        bus_error._free[:] = rows
    assert not np.any(bus_error._rows[rows, 1])
