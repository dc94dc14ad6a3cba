"""This engine beside llama.cpp and ik_llama.cpp: same weights, same tokens, same minutes.

    pip install -e '.[compare]'     # compiles llama.cpp: set CMAKE_BUILD_PARALLEL_LEVEL first
    python tools/make_synthetic.py --out DIR --layers 2
    python -m bench.compare -m DIR --gguf FOLDER_FOR_10_GB

`-m` may be given twice, for the published folder and for a packed one. Each is compared with GGUF
files whose routed experts are Q4_0 and whose other weights have as many bits as its own: bf16 for
the published layout, Q8_0 for int8 groups (--trunk overrides). `bench.to_gguf` writes them from the
published folder, if it is there, else from the packed one. Every engine takes its turn on every
file in a process of its own, round after round in rotating order; a turn computes each test once to
warm up and then repeats it.

Prints medians, smallest and largest, and how many times as fast this engine is; appends a line
with every sample, the versions, the commit and the date to bench/results/MACHINE.jsonl. Ctrl-C ends
it with the rounds that are complete.

ik_llama.cpp's wheels are built for AVX2. For a fair comparison on a newer CPU install the
wheel, but build its library there and name it in IK_LLAMA_CPP_LIB_PATH: unpack the source
distribution (it cannot be installed, a file of its examples is missing), then
    cmake -S vendor/ik_llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \\
        -DGGML_NATIVE=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama -j 2
Peers may live in virtual environments of their own: --python and --ik-python name them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.peers import PEERS
from bench.standings import OURS, TRUNKS, Contestant, Table, Turn, markdown, tabulate, unfair
from kimi_cpu import __version__, hardware
from kimi_cpu.benchmark.runner import Bench, Test, trace
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import UsageError, UserError
from kimi_cpu.kernels import isa
from kimi_cpu.store.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENGINES = (OURS, *PEERS)
RESULTS = ROOT / "bench" / "results"

#: Left free on the disk beside the GGUF files.
SPARE_BYTES = 2_000_000_000
#: Of a weight file's either end, to tell checkpoints apart.
SAMPLE_BYTES = 1 << 16


def our_turn(folder: Path, tests: list[Test], threads: int, repetitions: int, seed: int) -> Turn:
    """Measure this engine (in this process)."""
    from kimi_cpu.engine import Engine
    from kimi_cpu.kernels import isa

    config = ModelConfig.load(folder)
    ids = trace(config.vocab_size, max(test.end for test in tests), seed)
    logits = {}
    with Engine.load(folder, threads=threads) as engine:
        session = engine.session()
        for test in tests:
            logits[test.name] = session.sync(ids[: test.end].tolist()).tolist()
    del engine, session  # the bench may want all memory for its experts
    gc.collect()
    bench = Bench(
        folder, precision="fast", seed=seed, repetitions=repetitions, cold=False, profile=False,
        progress=lambda text, complete: None,
    )  # fmt: skip
    rows = list(bench.run(tests, [threads]))
    return Turn(
        engine=OURS,
        version=__version__,
        system=isa.VARIANT,
        settings="precision fast",
        seconds={row.test.name: [s.seconds for s in row.samples] for row in rows},
        logits=logits,
        ceiling_fraction={row.test.name: row.ceiling_fraction for row in rows},
        ceiling_gbps={row.test.name: row.ceiling_bytes_per_s / 1e9 for row in rows},
    )


def spec_of(
    engine: str, path: Path, config: ModelConfig, tests: list[Test], threads: int,
    repetitions: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What `bench.peers` is told."""
    yarn = config.rope_scaling
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
        "yarn": {"yarn_beta_fast": yarn.beta_fast, "yarn_beta_slow": yarn.beta_slow}
        if yarn
        else {},
    }


def peer_turn(python: str, spec: dict[str, Any], wrap: Sequence[str] = ()) -> Turn:
    """Measure a peer in a process of its own, started by `wrap`; UserError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "spec.json", Path(folder) / "result.json"
        question.write_text(json.dumps(spec))
        command = [*wrap, python, "-m", "bench.peers", str(question), str(answer)]
        engine = spec["engine"]
        hint = f"Is {PEERS[engine].package} installed for {python}, and is there memory enough?"
        return Turn(**_result_of(command, answer, engine, hint))


def _our_turn_apart(folder: Path, options: argparse.Namespace) -> Turn:
    """`our_turn` in a process of its own, so that nobody's memory stays taken."""
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "result.json"
        command = [
            *options.wrap, sys.executable, "-m", "bench.compare",
            "-m", str(folder.resolve()), "--turn", str(answer),
            "-p", ",".join(map(str, options.n_prompt)), "-n", ",".join(map(str, options.n_gen)),
            "-d", ",".join(map(str, options.n_depth)), "-r", str(options.repetitions),
            "-t", str(options.threads), "--seed", str(options.seed),
        ]  # fmt: skip
        hint = f"Does `kimi-cpu bench -m {folder}` work?"
        return Turn(**_result_of(command, answer, OURS, hint))


def _result_of(command: list[str], answer: Path, engine: str, hint: str) -> dict[str, Any]:
    """Run a turn's process and read its answer; UserError with its last words if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode or not answer.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"{engine} ended with {done.returncode}: {lines[-1] if lines else 'no message'}", hint
        )
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def commit() -> str:
    """The checkout's commit, with "+" if files differ from it; "" outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "kimi_cpu")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def machine() -> str:
    """A name for this machine's file of results; virtual machines call all CPUs alike."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{hardware.cpu_name()} {isa.CPU_NAME}".lower()).strip("-")
    return f"{words}-{hardware.default_threads()}-cores"


def trunk_of(folder: Path) -> str:
    """The key of TRUNKS that comes closest to how a checkpoint keeps its trunk."""
    checkpoint = Checkpoint.open(folder)
    weight = checkpoint.linear("model.layers.0.self_attn.o_proj")
    bits = 8 * weight.nbytes / (weight.shape[0] * weight.shape[1])
    checkpoint.close()
    return "bf16" if bits >= 12 else "q8_0"


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
    part = path.with_suffix(".part")  # a file that is there is whole
    done = subprocess.run(
        [python, "-m", "bench.to_gguf", str(folder), str(part), "--trunk", trunk], cwd=ROOT
    )
    if done.returncode:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the GGUF file could not be written",
            f"Is the package gguf installed for {python}?",
        )
    part.rename(path)


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's config and weights, whatever their folder is called and however old.

    Names, sizes, and the first and last bytes: reading all would take as long as converting.
    """
    digest = hashlib.sha256()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.kcpu")]
    for path in [folder / "config.json", *sorted(weights)]:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for at in (0, max(size - SAMPLE_BYTES, 0)):
                file.seek(at)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def gguf_file(python: str, source: Path, folder: Path, trunk: str) -> Path:
    """The GGUF file of `source` in `folder`, written if it is not there."""
    source = source.resolve()
    path = folder.resolve() / f"{source.name}-{fingerprint(source)}-{trunk}.gguf"
    if not path.exists():
        write_gguf(python, source, path, trunk)
    return path


def numbers(text: str) -> list[int]:
    """64,512 -> [64, 512]."""
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "-m", "--model", type=Path, action="append", required=True,
        help="checkpoint to compare on; twice: published and packed",
    )  # fmt: skip
    parser.add_argument("-p", "--n-prompt", type=numbers, default=[64, 512], help="64,512")
    parser.add_argument("-n", "--n-gen", type=numbers, default=[64], help="64")
    parser.add_argument("-d", "--n-depth", type=numbers, default=[0], help="0")
    parser.add_argument("-r", "--repetitions", type=int, default=2, help="of a test in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    parser.add_argument("-t", "--threads", type=int, default=hardware.default_threads())
    parser.add_argument("--seed", type=int, default=0, help="of the token ids")
    parser.add_argument("--trunk", help=f"the GGUF files': {', '.join(TRUNKS)} (default: as -m)")
    usual = ",".join(engine for engine in ENGINES if "--no-repack" not in engine)
    parser.add_argument("--engines", default=usual, help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--python", default=sys.executable, help="has llama-cpp-python and gguf")
    parser.add_argument("--ik-python", help="has ik-llama-cpp-python, if not --python")
    parser.add_argument(
        "--wrap", type=shlex.split, default=[], help="command that starts each turn, as numactl"
    )
    parser.add_argument("--gguf", type=Path, help="folder to keep the GGUF files in")
    parser.add_argument("--results", type=Path, help="file to append to (default: by machine)")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # where our turn's result goes
    return parser


def _plan(options: argparse.Namespace) -> tuple[list[str], list[Test]]:
    engines = options.engines.split(",")
    if unknown := set(engines) - set(ENGINES):
        raise UsageError(f"unknown engine {unknown.pop()!r}", f"Use {', '.join(ENGINES)}.")
    if options.trunk and (strange := set(options.trunk.split(",")) - set(TRUNKS)):
        raise UsageError(f"unknown --trunk {strange.pop()!r}", f"Use {', '.join(TRUNKS)}.")
    tests = []
    for depth in options.n_depth:
        tests += [Test(p, 0, depth) for p in options.n_prompt if p]
        tests += [Test(0, n, depth) for n in options.n_gen if n]
    if not tests or min(options.repetitions, options.rounds, options.threads) < 1:
        raise UsageError("there is nothing to measure", "Give -p or -n, -r and --rounds above 0.")
    return engines, tests


def _contestants(
    engines: list[str], options: argparse.Namespace, gguf_folder: Path
) -> list[Contestant]:
    """Who runs on what; writes the GGUF files that are missing."""
    models: list[Path] = options.model
    ours = {trunk_of(folder): folder for folder in models}
    if len(ours) < len(models):
        raise UsageError(
            f"two models keep their weights as {TRUNKS[next(iter(ours))]}",
            "Give one -m, or the published folder and a packed one.",
        )
    there = []
    if OURS in engines:
        there += [Contestant(OURS, trunk, folder) for trunk, folder in ours.items()]
    peers = [engine for engine in engines if engine != OURS]
    for trunk in (options.trunk.split(",") if options.trunk else ours) if peers else ():
        path = gguf_file(options.python, ours.get("bf16", models[0]), gguf_folder, trunk)
        there += [Contestant(engine, trunk, path) for engine in peers]
    return there


def compare(options: argparse.Namespace) -> int:
    """All rounds; prints the tables and appends the record. Returns the exit code.

    After Ctrl-C it does so with the rounds that are complete.
    """
    engines, tests = _plan(options)
    config = ModelConfig.load(options.model[0])
    started = datetime.now(UTC)
    rounds: list[list[Turn]] = []
    failed: dict[str, UserError] = {}
    interrupted = False

    def take_turn(contestant: Contestant) -> Turn:
        engine = contestant.engine
        if engine == OURS:
            return _our_turn_apart(contestant.path, options)
        apart = PEERS[engine].package.startswith("ik") and options.ik_python
        spec = spec_of(
            engine, contestant.path, config, tests, options.threads, options.repetitions,
            options.seed,
        )  # fmt: skip
        return peer_turn(apart or options.python, spec, options.wrap)

    def take_round(number: int, bar: tqdm[Any]) -> list[Turn]:
        turns = []
        shift = number % len(contestants)
        for contestant in contestants[shift:] + contestants[:shift]:
            bar.set_description(contestant.label)
            if contestant.label not in failed:
                try:
                    turn = take_turn(contestant)
                    turns.append(replace(turn, label=contestant.label, round=number))
                except UserError as error:
                    if contestant.engine == OURS:
                        raise
                    failed[contestant.label] = error
            bar.update()
        return turns

    with tempfile.TemporaryDirectory(dir=options.model[0].resolve().parent) as temporary:
        gguf_folder = options.gguf or Path(temporary)
        gguf_folder.mkdir(parents=True, exist_ok=True)
        contestants = _contestants(engines, options, gguf_folder)
        with tqdm(total=options.rounds * len(contestants), unit="turn", disable=None) as bar:
            try:
                for number in range(options.rounds):
                    rounds.append(take_round(number, bar))
            except KeyboardInterrupt:
                if not rounds:
                    raise
                interrupted = True
    # A contestant that failed later on has no full set of rounds: leave it out.
    turns = [turn for played in rounds for turn in played if turn.label not in failed]
    order = [contestant.label for contestant in contestants]
    turns.sort(key=lambda turn: (order.index(turn.label), turn.round))
    for label, error in failed.items():
        print(f"error: {label}: {error.message}\nhint: {error.hint}", file=sys.stderr)
    if not turns:
        return 1
    tables = tabulate(contestants, turns, tests)
    print(markdown(tables, turns))
    _append(options, started, tables, turns, failed)
    if interrupted:
        print(f"interrupted after {len(rounds)} of {options.rounds} rounds", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _append(
    options: argparse.Namespace, started: datetime, tables: list[Table], turns: list[Turn],
    failed: dict[str, UserError],
) -> None:  # fmt: skip
    """Write the record: what was measured, by whom, where and when."""
    record = {
        "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine(),
        "cpu": hardware.cpu_name(),
        "ram_bytes": hardware.ram_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "models": [folder.resolve().name for folder in options.model],
        "threads": options.threads,
        "rounds": len({turn.round for turn in turns}),
        "repetitions": options.repetitions,
        "seed": options.seed,
        "tables": [asdict(table) for table in tables],
        "unfair": unfair(turns),
        "failed": {label: error.message for label, error in failed.items()},
        "turns": [{k: v for k, v in asdict(turn).items() if k != "logits"} for turn in turns],
    }
    target = options.results or RESULTS / f"{machine()}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(f"Appended to {target}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.turn is None:
            return compare(options)
        tests = _plan(options)[1]
        turn = our_turn(options.model[0], tests, options.threads, options.repetitions, options.seed)
        options.turn.write_text(json.dumps(asdict(turn)))
    except UserError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted before the first round was complete", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
