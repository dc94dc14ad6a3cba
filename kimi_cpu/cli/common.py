"""What the verbs share: options, finding and loading the model, prompts, footers."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kimi_cpu import hardware
from kimi_cpu.cli.terminal import (
    RESET,
    Status,
    error_text,
    has_colour,
    is_terminal,
    moves_cursor,
    note,
)
from kimi_cpu.errors import CheckpointError, TemplateError, UsageError, UserError

if TYPE_CHECKING:
    from kimi_cpu.chat.generate import Result
    from kimi_cpu.chat.parser import Event
    from kimi_cpu.chat.template import ChatTemplate
    from kimi_cpu.cli.warmup import Warmup
    from kimi_cpu.engine import Engine, Session
    from kimi_cpu.sampling import SamplingParams
    from kimi_cpu.server.prompts import ChatPrompt
    from kimi_cpu.server.replay import Replies
    from kimi_cpu.server.settings import ServedModel
    from kimi_cpu.store.experts.stats import ExpertStats
    from kimi_cpu.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
Command = TypeVar("Command", bound=Callable[..., Any])

GENERATION_CONFIG = "generation_config.json"
#: Undoes a mode of the terminal that editors switch on.
_END_PASTING = "\x1b[?2004l"
#: What a newcomer may ask the embedded model.
NANO_EXAMPLES = ("What is 17 + 25?", "What is the capital of France?", "What is 318 * 27?")

_OPTIONS = (
    click.option(
        "--model", "-m", metavar="PATH", help="Folder of a model in Hugging Face's layout."
    ),
    click.option("--system", "-s", metavar="TEXT", help="Instructions for the model."),
    click.option("--tools", metavar="FILE", help="JSON file that declares OpenAI-style tools."),
    click.option("--temp", type=float, metavar="T", help="Temperature; 0 takes the likeliest."),
    click.option("--top-p", type=float, metavar="P", help="Keep the likeliest of mass P."),
    click.option("--top-k", type=int, metavar="K", help="Keep the K likeliest tokens."),
    click.option("--min-p", type=float, metavar="P", help="Drop below P times the likeliest."),
    click.option("--seed", type=int, metavar="N", help="Same seed, same answer."),
    click.option("--max-tokens", "-n", type=int, metavar="N", help="Most tokens of a reply."),
    click.option("--think/--no-think", default=None, help="Reason before answering, or never."),
    click.option(
        "--thinking-budget", type=int, metavar="N", help="Close the reasoning after N tokens."
    ),
    click.option("--threads", "-t", type=int, metavar="N", help="CPU threads; default: all cores."),
    click.option(
        "--precision",
        type=click.Choice(["fast", "exact"]),
        default="fast",
        show_default=True,
        help="int8 activations, or float32 as the reference computes.",
    ),
)


def parsed_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of options that are amounts of bytes."""
    if value is None:
        return None
    from kimi_cpu.store.experts.budget import parse_size

    return parse_size(value)


_STORE_OPTIONS = (
    click.option(
        "--memory", metavar="SIZE", callback=parsed_size,
        help="Memory to use, like 16G; default: available less a tenth (1 GB at most).",
    ),
    click.option(
        "--io", type=click.Choice(["auto", "mmap", "direct"]), default="auto", show_default=True,
        help="How experts come from the disk; auto measures once which is faster.",
    ),
)  # fmt: skip
trace_option = click.option(
    "--trace", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write to FILE which experts each token uses, for `kimi-cpu plan`.",
)  # fmt: skip


def store_options(command: Command) -> Command:
    """How experts come into memory: the options of everything that computes."""
    for option in reversed(_STORE_OPTIONS):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """The options of `chat` and `run`."""
    command = store_options(trace_option(command))
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass
class Loaded:
    """A model ready to talk: everything a reply needs."""

    folder: Path
    engine: Engine
    session: Session
    tokenizer: Tokenizer
    template: ChatTemplate

    @property
    def embedded(self) -> bool:
        """Whether this is the nano model that comes along."""
        return self.folder in embedded_folders()

    @property
    def name(self) -> str:
        return "nano" if self.embedded else self.folder.resolve().name

    def expert_stats(self) -> ExpertStats | None:
        """What the expert store has done so far; None if all experts stay in memory anyway."""
        store = self.engine.experts
        return store.stats() if store.bounded else None

    @cached_property
    def replies(self) -> Replies:
        """What the model has said, in the tokens that it sampled."""
        from kimi_cpu.server.replay import Replies

        return Replies(self.tokenizer)

    @property
    def served(self) -> ServedModel:
        """The model as a server has it: prompts and replies are made alike."""
        from kimi_cpu.sampling import SamplingParams
        from kimi_cpu.server.settings import ServedModel

        return ServedModel(self.name, self.engine, self.tokenizer, self.template, SamplingParams())

    def prompt(
        self, messages: Messages, tools: Tools, *, thinking: bool | None = None, reply: bool = True
    ) -> ChatPrompt:
        """The prompt of a conversation.

        reply: whether its ids end where the reply begins; else where the next message does.
        """
        from kimi_cpu.server.prompts import chat_prompt

        prompt = chat_prompt(
            self.served,
            self.replies,
            messages,
            tools or None,
            thinking=thinking,
            add_generation_prompt=reply,
            check=False,
        )
        if reply and not any(self.tokenizer.is_control(i) for i in prompt.ids):
            raise TemplateError(
                f"{self.template.name}: writes none of the tokenizer's control tokens",
                "The template and the tokenizer files must be of the same checkpoint.",
            )
        return prompt


def embedded_folders() -> tuple[Path, Path]:
    """Where the nano model may lie: inside the installed package, or in a clone."""
    package = Path(__file__).resolve().parent.parent
    return package / "_nano", package.parent / "weights" / "nano"


def embedded_model() -> Path:
    """The nano model's folder."""
    for folder in embedded_folders():
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        "the embedded nano model is missing", "Name a model folder: --model PATH."
    )


def model_folder(named: str | None) -> Path:
    """The folder to use: --model, else KIMI_CPU_MODEL, else the nano model (said on stderr)."""
    source = "--model"
    if named is None and (named := os.environ.get("KIMI_CPU_MODEL") or None):
        source = "KIMI_CPU_MODEL"
    if named is None:
        folder = embedded_model()
        note("No --model given: using the embedded nano model, a tiny demonstration, not Kimi.")
        return folder
    folder = Path(named).expanduser()
    if folder.is_file():
        raise UsageError(
            f"{source} names a file: {folder}", f"Name its folder: --model {folder.parent}"
        )
    if not folder.is_dir():
        raise UsageError(
            f"{source} names no folder: {folder}",
            "It must hold config.json, safetensors and the tokenizer. "
            "Without --model the embedded nano model is used.",
        )
    if not (folder / "config.json").exists():
        raise UsageError(
            f"{source} names a folder without config.json: {folder}",
            "Name the folder of a model in Hugging Face's layout.",
        )
    return folder


def compile_kernels() -> None:
    """What the first start on a machine takes its time for. Imports numba."""
    from kimi_cpu.kernels import isa

    if isa.is_cached():
        return
    note("Compiling the kernels for this CPU, only this once (half a minute) ...")
    from tqdm import tqdm

    from kimi_cpu.kernels.fast import compile_all

    with tqdm(
        desc="compiling", total=0, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
        disable=None, leave=False, file=sys.stderr,
    ) as bar:  # fmt: skip
        for left in compile_all():
            bar.total = max(bar.total, left)
            bar.update(bar.total - left - bar.n)
            bar.refresh()


def watch_weight_files() -> None:
    """Let a weight file that vanishes under a computation end the process like any other error.

    To be called before the checkpoint is opened. Imports numba.
    """
    from kimi_cpu import bus_error

    def text_of(error: UserError) -> bytes:
        err, text = sys.stderr, error_text(error.message, error.hint)
        if is_terminal(err):  # in whatever state a reply or the editor has left it
            text = "\n" + text
        if moves_cursor(err):
            text = (RESET if has_colour(err) else "") + _END_PASTING + text
        return text.encode(err.encoding or "utf-8", "replace")

    bus_error.install(text_of)


def load_model(
    folder: Path, threads: int | None, precision: str, *, memory: int | None = None,
    latents: int | None = 0, io: str = "auto", trace: Path | None = None,
) -> Loaded:  # fmt: skip
    """Open a model folder, tokenizer and template first: they fail fastest.

    The arguments are those of `Engine.load`.
    """
    if threads is not None and not 1 <= threads <= hardware.MAX_THREADS:
        raise UsageError(f"--threads is {threads}", f"Use 1 to {hardware.MAX_THREADS:,}.")
    status = Status()
    status.show("loading ...")
    try:
        from kimi_cpu.chat.generate import check_tokenizer
        from kimi_cpu.chat.template import ChatTemplate
        from kimi_cpu.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(folder)
        template = ChatTemplate.load(folder)
        from kimi_cpu.engine import Engine

        watch_weight_files()
        engine = Engine.load(
            folder, precision=precision, threads=threads, memory=memory, latents=latents,  # type: ignore[arg-type]
            io=io, trace=trace,  # type: ignore[arg-type]
        )  # fmt: skip
        check_tokenizer(tokenizer, engine.config)
    finally:
        status.clear()
    compile_kernels()
    return Loaded(folder, engine, engine.session(), tokenizer, template)


def sampling_params(
    folder: Path,
    *,
    temp: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    think: bool | None = None,
    thinking_budget: int | None = None,
) -> SamplingParams:
    """The options given, over the checkpoint's recommendations, over temperature 1.

    `generation_config.json` may recommend temperature, top_p, top_k and min_p, and greedy decoding
    by `do_sample: false`.
    """
    from kimi_cpu.sampling import SamplingParams

    if think is False and thinking_budget:
        raise UsageError("--no-think and --thinking-budget contradict", "Give one of the two.")
    if think and thinking_budget == 0:
        raise UsageError("--think and --thinking-budget 0 contradict", "Give one of the two.")
    values: dict[str, Any] = _recommended(folder)
    given = {
        "temperature": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "thinking_budget": 0 if think is False else thinking_budget,
    }
    if temp is not None and temp > 0 and values.get("temperature") == 0:
        values = {}  # the recommendation was greedy: its other numbers meant nothing
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        return SamplingParams(**values)
    except UsageError as error:
        name = error.message.split(" ")[0]
        option = {"temperature": "--temp"}.get(name, "--" + name.replace("_", "-"))
        message, hint = (text.replace(name, option, 1) for text in (error.message, error.hint))
        raise UsageError(message, hint) from None


def _recommended(folder: Path) -> dict[str, Any]:
    """The checkpoint's own sampling parameters. CheckpointError when they are unusable."""
    from kimi_cpu.config.reader import load_json_object
    from kimi_cpu.sampling import SamplingParams

    path = folder / GENERATION_CONFIG
    if not path.exists():
        return {}
    hint = "Take the file from the model's repository again, or remove it."
    config = load_json_object(path, CheckpointError, hint)
    names = ("temperature", "top_p", "top_k", "min_p")
    values = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except UsageError as error:
        raise CheckpointError(f"{path}: {error.message}", hint) from None
    return values


def declared_tools(path: str | None) -> Tools:
    """The tools of `--tools FILE`; none for `--tools none`."""
    if path is None or path == "none":
        return []
    from kimi_cpu.chat.tools import load_tools

    return load_tools(path)


def reply_events(
    model: Loaded,
    messages: Messages,
    tools: Tools,
    params: SamplingParams,
    cancelled: Callable[[], bool] = lambda: False,
    warmup: Warmup | None = None,
) -> Iterator[Event | Result]:
    """A reply to a conversation, with a status line until the first event: as the server makes it,
    with the same constraint on calls, from the tokens that the model sampled before.

    warmup: it may be using the session, and gives it back first; if `cancelled` becomes true
        before it does, there are no events, not even a Result.
    """
    from kimi_cpu.chat.generate import Result, drive
    from kimi_cpu.server.prompts import chat_reply

    thinking = False if params.thinking_budget == 0 else None
    prompt = model.prompt(messages, tools, thinking=thinking)
    # Grammars come with the extra [server].
    constrained = importlib.util.find_spec("llguidance") is not None
    reply = chat_reply(model.served, prompt, params, constrained=constrained)
    status = Status()
    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if 0 < done < total:
            left = (time.perf_counter() - started) / done * (total - done)
            status.show(f"reading {done:,} of {total:,} tokens ... {left:.0f} s left")

    try:
        if warmup is not None:
            status.show("getting ready ...")
            if not warmup.finish(prompt.ids, cancelled):
                return
        todo = len(prompt.ids) - model.session.common_prefix(prompt.ids)
        status.show(f"reading {todo:,} tokens ...")
        started = time.perf_counter()
        for event in drive(model.session, reply, cancelled=cancelled, progress=progress):
            status.clear()
            if isinstance(event, Result):
                model.replies.remember(prompt.key, event.message, [*reply.prompt, *reply.ids])
            yield event
    finally:
        status.clear()


def footer(result: Result, experts: ExpertStats | None = None) -> str:
    """`42 tokens · 31.0 tok/s · first token 0.2 s`, and how the reply ended if oddly.

    experts: what the store did meanwhile; told if not all experts fit into memory.
    """
    usage, timings = result.usage, result.timings
    count = usage.completion_tokens
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if timings.decode_tps:
        parts.append(f"{timings.decode_tps:.1f} tok/s")
    first_s = timings.first_token_s
    parts.append(
        f"first token {first_s:.1f} s" if first_s >= 0.1 else f"first token {first_s:.2f} s"
    )
    if experts is not None:
        parts.append(f"{experts.hit_rate:.0%} of experts in memory")
    if result.finish_reason == "length":
        parts.append("cut off: token limit or context reached")
    elif result.finish_reason == "cancelled":
        parts.append("stopped")
    return " · ".join(parts)


def call_line(call: dict[str, Any], result: str | None = None) -> str:
    """One line for a tool call: `calculator(17 * 23) → 391`."""
    function = call["function"]
    arguments = function["arguments"]
    try:
        values = json.loads(arguments)
    except (ValueError, TypeError):
        values = None
    if isinstance(values, dict):
        if len(values) == 1 and isinstance(only := next(iter(values.values())), str):
            arguments = only
        else:
            arguments = ", ".join(
                f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items()
            )
    line = f"{function['name']}({arguments})"
    return line if result is None else f"{line} → {result}"


def read_stdin() -> str:
    """All of standard input as text, lines ending in newlines only.

    Bytes that are not UTF-8 become U+FFFD, a byte order mark goes.
    """
    text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    return text.replace("\r\n", "\n")


def with_system(system: str | None, messages: Sequence[dict[str, Any]]) -> Messages:
    """The conversation with its system message in front."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *messages]
