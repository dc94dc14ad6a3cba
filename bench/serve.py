"""Measure the server over HTTP: first tokens, clients together, mixed load with disconnects.

    python -m bench.serve                        # the nano model
    python -m bench.serve -m FOLDER --parts first together -- --threads 2

It starts `kimi-cpu serve` itself, with the options after `--`. Prompts are token ids, to
/v1/completions; the model needs a tokenizer all the same. The exit code is 1 if there were errors
or leaks, or if any answer differs from that to a single client.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from kimi_cpu.cli.common import embedded_model
from kimi_cpu.planning.shape import shape_of_checkpoint
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.tokenizer import Tokenizer

REPLY = 256
CLIENTS = (1, 4, 8)
PARTS = ("first", "together", "mixed")


class Server:
    """A process of its own."""

    def __init__(self, args: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kimi_cpu", "serve", "--port", "0", *args],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"(http://\S+)/v1", line):
                self.url = found[1]
                break
        else:
            raise SystemExit("the server did not start")
        self._drain = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=self.log)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._drain.wait()

    def counts(self) -> tuple[float, int, int]:
        """Resident MB, threads, open files."""
        folder = Path("/proc") / str(self.process.pid)
        pages = int((folder / "statm").read_text().split()[1])
        threads, files = (len(list((folder / name).iterdir())) for name in ("task", "fd"))
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, threads, files


async def complete(client: httpx.AsyncClient, ids: list[int], n: int, **fields) -> dict:
    body = {"prompt": ids, "max_tokens": n, "temperature": 0, **fields}
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()


async def first_token(client: httpx.AsyncClient, ids: list[int], what: str) -> None:
    begun = time.perf_counter()
    usage = (await complete(client, ids, 1))["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    print(f"first token, {what}: {time.perf_counter() - begun:.3f} s, "
          f"{cached:,} of {len(ids):,} known", flush=True)  # fmt: skip


def limits(source: Path) -> None:
    """What memory allows: a step reads the trunk once, and each chosen expert once."""
    checkpoint = Checkpoint.open(source)
    shape = shape_of_checkpoint(checkpoint)
    checkpoint.close()
    share = shape.top_k / shape.n_experts
    experts = shape.n_moe_layers * shape.n_experts * shape.expert_bytes
    n_bytes = [shape.trunk_bytes + experts * (1 - (1 - share) ** n) for n in CLIENTS]
    for n, step in zip(CLIENTS, n_bytes, strict=True):
        print(f"{n} clients: {step / 1e6:,.0f} MB a step if they choose evenly, so memory allows "
              f"{n * n_bytes[0] / step:.2f} times one")  # fmt: skip


async def together(client: httpx.AsyncClient, make, n: int, control: list[int]) -> float:
    """Tokens a second of n clients, all of them."""
    never_end = {str(token): -100 for token in control}
    prompts = [make(32) for _ in range(n)]
    await asyncio.gather(*(complete(client, ids, 1) for ids in prompts))
    begun = time.perf_counter()
    answers = await asyncio.gather(
        *(complete(client, ids, REPLY, logit_bias=never_end) for ids in prompts)
    )
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / (time.perf_counter() - begun)


async def mixed(server: Server, client: httpx.AsyncClient, make, seconds: float) -> bool:
    """Eight clients, a third of whose requests leave; whether all went well."""
    work = [make(random.choice([8, 60, 400, 900])) for _ in range(24)]
    alone = [(await complete(client, ids, 24))["choices"][0]["text"] for ids in work]
    done = left = differ = errors = 0
    until = time.monotonic() + seconds

    async def one() -> None:
        nonlocal done, left, differ, errors
        while time.monotonic() < until:
            n = random.randrange(len(work))
            limit = random.uniform(0, 0.3) if random.random() < 1 / 3 else 120.0
            try:
                async with asyncio.timeout(limit):
                    text = (await complete(client, work[n], 24))["choices"][0]["text"]
                done += 1
                differ += text != alone[n]
            except TimeoutError:
                left += limit < 1
                errors += limit > 1
            except httpx.HTTPError as error:
                errors += 1
                print(f"error: {error!r}")

    async def watch() -> tuple[float, int, int]:
        await asyncio.sleep(seconds / 3)
        return server.counts()

    before, *_ = await asyncio.gather(watch(), *(one() for _ in range(8)))
    await asyncio.sleep(1)
    after = server.counts()
    print(f"mixed, {seconds:.0f} s: {done} answers, {differ} differ from those alone; {left} left; "
          f"{errors} errors")  # fmt: skip
    print(f"MB, threads, files: {before} after a third, {after} at the end")
    leaks = after[0] > before[0] * 1.1 + 50 or after[1] > before[1] + 2 or after[2] > before[2] + 8
    return not errors and not leaks and not differ


async def measure(args: argparse.Namespace, folder: str) -> bool:
    options = [*(["-m", args.model] if args.model else []), "--cache-dir", folder, *args.options]
    rng = random.Random(0)
    source = Path(args.model) if args.model else embedded_model()
    control = list(Tokenizer.load(source).special_tokens.values())

    def make(n: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(n)]

    prompt = make(args.prompt)
    for what in ("cold", "after a restart") if "first" in args.parts else ("at once",):
        server = Server(options)
        async with httpx.AsyncClient(base_url=server.url, timeout=1800) as client:
            try:
                await complete(client, [1, 2, 3], 4)
                if "first" in args.parts:
                    await first_token(client, prompt, what)
                if what == "cold":
                    await first_token(client, prompt, "warm")
                    continue
                if "together" in args.parts:
                    limits(source)
                    # Brings the experts into memory, those of the last layer, too: it is only
                    # computed where logits are asked for.
                    await complete(client, make(600), 1, echo=True, logprobs=1)
                    one = None
                    for n in CLIENTS:
                        rate = await together(client, make, n, control)
                        one = one or rate
                        print(f"{n} clients: {rate:.1f} tokens/s, {rate / one:.2f} times one",
                              flush=True)  # fmt: skip
                if "mixed" in args.parts:
                    return await mixed(server, client, make, args.seconds)
            finally:
                server.stop()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="folder of a model; default: nano")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the long prompt")
    parser.add_argument("--seconds", type=float, default=600, help="of mixed load")
    parser.add_argument("options", nargs="*", help="after --: options of kimi-cpu serve")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(0 if asyncio.run(measure(args, folder)) else 1)


if __name__ == "__main__":
    main()
