"""This engine beside llama.cpp and ik_llama.cpp: same weights, same tokens, same minutes.

    pip install -e '.[compare]'     # compiles llama.cpp: set CMAKE_BUILD_PARALLEL_LEVEL first
    python tools/make_synthetic.py --out DIR --layers 2
    python -m bench.compare -m DIR -p 64,512 -n 64 --rounds 3

The checkpoint is written as GGUF (`bench.to_gguf`: experts Q4_0, the rest by --trunk), then each
engine takes its turn in a process of its own, round after round in changing order. Each turn
computes every test once to warm up and then repeats it. The table shows means over all rounds and
how many times faster this engine is; a line is appended to bench/results/MACHINE.jsonl.

ik_llama.cpp's wheels are built for AVX2. For a fair comparison on a newer CPU build its library
there and name it in IK_LLAMA_CPP_LIB_PATH: unpack the source distribution (it cannot be installed,
a file is missing), then `cmake -S vendor/ik_llama.cpp -B build -DCMAKE_BUILD_TYPE=Release
-DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF`
and `cmake --build build --target llama`. Peers may live in virtual environments of their own:
--python and --ik-python name their interpreters.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import PACKAGES
from kimi_cpu import __version__, hardware
from kimi_cpu.benchmark.runner import Bench, Test, trace
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import UsageError, UserError
from kimi_cpu.store.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
OURS = "kimi-cpu"
ENGINES = (OURS, *PACKAGES)
RESULTS = ROOT / "bench" / "results"

#: Left free on the disk beside the GGUF file.
SPARE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Turn:
    """What one engine measured in one round: seconds by test, and who it was."""

    engine: str
    version: str
    system: str
    seconds: dict[str, list[float]]
    logits: dict[str, list[float]]
    ceiling_fraction: dict[str, float]


def our_turn(folder: Path, tests: list[Test], threads: int, repetitions: int, seed: int) -> Turn:
    """Measure this engine (in this process)."""
    from kimi_cpu.engine import Engine
    from kimi_cpu.kernels import isa

    bench = Bench(
        folder, precision="fast", seed=seed, repetitions=repetitions, cold=False, profile=False,
        progress=lambda text, complete: None,
    )  # fmt: skip
    rows = list(bench.run(tests, [threads]))
    ids = trace(bench.config.vocab_size, max(test.end for test in tests), seed)
    logits = {}
    with Engine.load(folder, threads=threads) as engine:
        session = engine.session()
        for test in tests:
            logits[test.name] = session.sync(ids[: test.end].tolist()).tolist()
    return Turn(
        engine=OURS,
        version=__version__,
        system=isa.VARIANT,
        seconds={row.test.name: [s.seconds for s in row.samples] for row in rows},
        logits=logits,
        ceiling_fraction={row.test.name: row.ceiling_fraction for row in rows},
    )


def spec_of(
    engine: str, path: Path, config: ModelConfig, tests: list[Test], threads: int,
    repetitions: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What `bench.peers` is told."""
    return {
        "engine": engine,
        "path": str(path),
        "threads": threads,
        "repetitions": repetitions,
        "ids": trace(config.vocab_size, max(test.end for test in tests), seed).tolist(),
        "tests": [
            {
                "name": test.name,
                "n_prompt": test.n_prompt,
                "n_gen": test.n_gen,
                "n_depth": test.n_depth,
            }
            for test in tests
        ],
        "mha_shape": {
            "deepseek2.attention.head_count_kv": config.num_attention_heads,
            "deepseek2.attention.key_length": config.qk_head_dim,
            "deepseek2.attention.value_length": config.v_head_dim,
        },
    }


def peer_turn(python: str, spec: dict[str, Any], wrap: Sequence[str] = ()) -> Turn:
    """Measure a peer in a process of its own, started by `wrap`; UserError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "spec.json", Path(folder) / "result.json"
        question.write_text(json.dumps(spec))
        done = subprocess.run(
            [*wrap, python, "-m", "bench.peers", str(question), str(answer)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode or not answer.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(
                f"{spec['engine']} ended with {done.returncode}: {lines[-1] if lines else ''}",
                f"Is {PACKAGES[spec['engine']]} installed for {python}?",
            )
        return Turn(**json.loads(answer.read_text()), ceiling_fraction={})


def relative_error(logits: list[float], reference: list[float]) -> float:
    """Root mean square of the difference, as a share of the reference's spread."""
    ours, theirs = np.array(logits), np.array(reference)
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / np.std(theirs))


def summarise(turns: list[Turn], tests: list[Test]) -> dict[str, dict[str, dict[str, float]]]:
    """test -> engine -> avg_ts, stddev_ts, ratio (ours to its), samples; over all rounds."""
    engines = list(dict.fromkeys(turn.engine for turn in turns))
    table: dict[str, dict[str, dict[str, float]]] = {}
    for test in tests:
        cells: dict[str, dict[str, float]] = {}
        for engine in engines:
            rates = [
                test.n_tokens / seconds
                for turn in turns
                if turn.engine == engine
                for seconds in turn.seconds[test.name]
            ]
            cells[engine] = {
                "avg_ts": statistics.fmean(rates),
                "stddev_ts": statistics.stdev(rates) if len(rates) > 1 else 0.0,
                "samples": len(rates),
            }
        if OURS in cells:
            for cell in cells.values():
                cell["ratio"] = cells[OURS]["avg_ts"] / cell["avg_ts"]
        table[test.name] = cells
    return table


def markdown(table: dict[str, dict[str, dict[str, float]]], turns: list[Turn], trunk: str) -> str:
    """The table, and which versions ran."""
    engines = list(next(iter(table.values())))
    head = ["test", *(f"{engine}, t/s" for engine in engines)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, cells in table.items():
        row = [name]
        for engine in engines:
            cell = cells[engine]
            text = f"{cell['avg_ts']:.2f} ± {cell['stddev_ts']:.2f}"
            if engine != OURS and "ratio" in cell:
                text += f" ({cell['ratio']:.2f} x)"
            elif engine == OURS:
                fractions = [t.ceiling_fraction[name] for t in turns if t.engine == OURS]
                text += f" ({statistics.fmean(fractions):.0%} of memory)"
            row.append(text)
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", f"n x: this engine is n times as fast. GGUF: experts Q4_0, the rest {trunk}."]
    for engine in engines:
        turn = next(t for t in turns if t.engine == engine)
        line = f"- {engine} {turn.version}: {' '.join(turn.system.split())}"
        if engine != OURS and any(t.engine == OURS for t in turns):
            ours = next(t for t in turns if t.engine == OURS)
            # The middle one: where quantisation tips the router over, single tests are far off.
            error = statistics.median(relative_error(ours.logits[n], turn.logits[n]) for n in table)
            line += f"; its logits differ from ours by {error:.1%} of their spread"
        lines.append(line)
    return "\n".join(lines)


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "" outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "kimi_cpu")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def machine() -> str:
    """A name for this machine's file of results."""
    words = re.sub(r"[^a-z0-9]+", "-", hardware.cpu_name().lower()).strip("-")
    return f"{words}-{hardware.default_threads()}-cores"


def write_gguf(python: str, folder: Path, path: Path, trunk: str) -> None:
    """Write the GGUF file with the Python that has the package; UserError if it fails."""
    checkpoint = Checkpoint.open(folder)
    needed = checkpoint.total_bytes + SPARE_BYTES
    checkpoint.close()
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"{path.parent}: up to {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB are free",
            "Give another --gguf, or a checkpoint with fewer --layers or --experts.",
        )
    done = subprocess.run(
        [python, "-m", "bench.to_gguf", str(folder), str(path), "--trunk", trunk], cwd=ROOT
    )
    if done.returncode:
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the GGUF file could not be written",
            f"Is the package gguf installed for {python}?",
        )


def numbers(text: str) -> list[int]:
    """64,512 -> [64, 512]."""
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, required=True, help="checkpoint to compare on")
    parser.add_argument("--ours", type=Path, help="what this engine runs, if not --model (packed)")
    parser.add_argument("-p", "--n-prompt", type=numbers, default=[64, 512])
    parser.add_argument("-n", "--n-gen", type=numbers, default=[64])
    parser.add_argument("-d", "--n-depth", type=numbers, default=[0])
    parser.add_argument("-r", "--repetitions", type=int, default=2, help="of a test in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    parser.add_argument("-t", "--threads", type=int, default=hardware.default_threads())
    parser.add_argument("--seed", type=int, default=0, help="of the token ids")
    parser.add_argument("--trunk", choices=["q8_0", "bf16"], default="q8_0")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--python", default=sys.executable, help="has llama-cpp-python and gguf")
    parser.add_argument("--ik-python", help="has ik-llama-cpp-python, if not --python")
    parser.add_argument(
        "--wrap", type=shlex.split, default=[], help="command that starts each turn, as numactl"
    )
    parser.add_argument("--gguf", type=Path, help="keep the GGUF file here, and use it if it is")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # where our turn's result goes
    parser.add_argument("--results", type=Path, help="file to append to (default: by machine)")
    return parser


def _plan(options: argparse.Namespace) -> tuple[list[str], list[Test]]:
    engines = options.engines.split(",")
    if unknown := set(engines) - set(ENGINES):
        raise UsageError(f"unknown engine {unknown.pop()!r}", f"Use {', '.join(ENGINES)}.")
    tests = []
    for depth in options.n_depth:
        tests += [Test(p, 0, depth) for p in options.n_prompt if p]
        tests += [Test(0, n, depth) for n in options.n_gen if n]
    if not tests or min(options.repetitions, options.rounds, options.threads) < 1:
        raise UsageError("there is nothing to measure", "Give -p or -n, -r and --rounds above 0.")
    return engines, tests


def compare(options: argparse.Namespace) -> None:
    """All rounds; prints the table and appends the record."""
    engines, tests = _plan(options)
    config = ModelConfig.load(options.model)
    turns: list[Turn] = []
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(dir=options.model.resolve().parent) as temporary:
        path = options.gguf or Path(temporary) / "model.gguf"
        if set(engines) != {OURS} and not path.exists():
            write_gguf(options.python, options.model, path, options.trunk)
        for round_number in range(options.rounds):
            shift = round_number % len(engines)
            for engine in engines[shift:] + engines[:shift]:
                print(f"round {round_number + 1}: {engine}", file=sys.stderr, flush=True)
                if engine == OURS:
                    turns.append(_our_turn_apart(options))
                    continue
                python = options.python
                if engine.startswith("ik") and options.ik_python:
                    python = options.ik_python
                spec = spec_of(
                    engine, path, config, tests, options.threads, options.repetitions,
                    options.seed,
                )  # fmt: skip
                turns.append(peer_turn(python, spec, options.wrap))
    turns.sort(key=lambda turn: engines.index(turn.engine))
    table = summarise(turns, tests)
    text = markdown(table, turns, options.trunk)
    print(text)
    record = {
        "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine(),
        "model": options.model.name,
        "trunk": options.trunk,
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": {turn.engine: f"{turn.version} {turn.system}".strip() for turn in turns},
        "ceiling_fraction": [t.ceiling_fraction for t in turns if t.engine == OURS],
        "table": table,
        "seconds": [{"engine": t.engine, **t.seconds} for t in turns],
    }
    target = options.results or RESULTS / f"{machine()}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _our_turn_apart(options: argparse.Namespace) -> Turn:
    """`our_turn` in a process of its own, so that nobody's memory stays taken."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        model = str((options.ours or options.model).resolve())
        command = [
            *options.wrap, sys.executable, "-m", "bench.compare",
            "-m", model, "--turn", str(answer),
            "-p", ",".join(map(str, options.n_prompt)), "-n", ",".join(map(str, options.n_gen)),
            "-d", ",".join(map(str, options.n_depth)), "-r", str(options.repetitions),
            "-t", str(options.threads), "--seed", str(options.seed),
        ]  # fmt: skip
        if subprocess.run(command, cwd=ROOT).returncode:
            raise UserError(f"{OURS} failed on {model}", "See above.")
        return Turn(**json.loads(answer.read_text()))


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.turn is not None:
            tests = _plan(options)[1]
            turn = our_turn(
                options.model, tests, options.threads, options.repetitions, options.seed
            )
            options.turn.write_text(json.dumps(asdict(turn)))
        else:
            compare(options)
    except UserError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
