"""`kimi-cpu chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kimi_cpu.cli import common
from kimi_cpu.cli.conversations import Conversation, ConversationStore, data_folder
from kimi_cpu.cli.terminal import note, print_error, printable
from kimi_cpu.cli.warmup import Warmup
from kimi_cpu.errors import UserError

if TYPE_CHECKING:
    from kimi_cpu.chat.generate import Result
    from kimi_cpu.cli.prompting import Source
    from kimi_cpu.sampling import SamplingParams

MAX_TOOL_ROUNDS = 8
RETRY_TEMPERATURE = 0.7


@click.command(
    epilog="By default the model may call a built-in calculator and clock, which run here; with "
    "--tools you are asked for the results of the tools in FILE. --tools none declares nothing."
)
@common.model_options
@click.option("--continue", "-c", "resume", is_flag=True, help="Resume the newest conversation.")
@click.option("--no-save", is_flag=True, help="Keep nothing of this conversation on disk.")
def command(
    model: str | None,
    system: str | None,
    tools: str | None,
    threads: int | None,
    precision: str,
    memory: int | None,
    io: str,
    trace: Path | None,
    resume: bool,
    no_save: bool,
    **sampling: Any,
) -> None:
    """Talk with a model; conversations are kept."""
    declared = common.declared_tools(tools)
    store = ConversationStore()
    conversation = store.newest() if resume else None
    if resume and conversation is None:
        note("There is no conversation to continue: this is a new one.")
    conversation = conversation or Conversation()
    if system is not None:
        conversation.system = system
    folder = common.model_folder(model)
    params = common.sampling_params(folder, **sampling)
    loaded = common.load_model(folder, threads, precision, memory=memory, io=io, trace=trace)
    from kimi_cpu.cli.chat_commands import COMMANDS
    from kimi_cpu.cli.prompting import open_source

    source = open_source(data_folder(), COMMANDS)
    chat = Chat(loaded, params, source, store, conversation, declared, tools != "none", not no_save)
    chat.greet(resumed=bool(conversation.messages))
    chat.loop()
    if not chat.warmup.abandon():
        # Native code cannot be interrupted, and leaving under it could crash: everything is saved.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@dataclass
class Totals:
    """Sums over the replies of this run, for /stats."""

    replies: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decode_s: float = 0.0


class Chat:
    """One run of the chat: the conversation, how to continue it, and where lines come from."""

    def __init__(
        self,
        model: common.Loaded,
        params: SamplingParams,
        source: Source,
        store: ConversationStore,
        conversation: Conversation,
        declared: common.Tools,
        builtins: bool,
        save: bool,
    ) -> None:
        from kimi_cpu.chat.tools import BUILTIN_TOOLS

        self.model = model
        self.params = params
        self.store = store
        self.conversation = conversation
        self.totals = Totals()
        self.running = True
        self.warmup = Warmup(model.session)
        self._source = source
        self._save = save
        taken = {tool["function"]["name"] for tool in declared}
        own = [tool for tool in BUILTIN_TOOLS if tool["function"]["name"] not in taken]
        self._builtin_names = {tool["function"]["name"] for tool in own} if builtins else set()
        self._tools: common.Tools = [*declared, *(own if builtins else [])]
        self._retries = 0

    def greet(self, resumed: bool) -> None:
        """Say where we are."""
        if self._source.interactive:
            note(f"kimi-cpu chat · {self.model.name} · /help lists the commands, Ctrl-D leaves")
            if self.model.embedded and not resumed:
                note("Try: " + " · ".join(common.NANO_EXAMPLES))
        if resumed:
            self.recall()
            if self.conversation.model not in ("", self.model.name):
                note(f"It was held with {self.conversation.model}.")

    def loop(self) -> None:
        """Read lines until the end of input or /exit."""
        while self.running:
            self._warm_up()
            try:
                line = self._source.read()
            except EOFError:
                break
            if line.strip():
                self.handle(line)
        if self._source.interactive and self.conversation.name and self._save:
            note(f"Saved as {self.conversation.name}; `kimi-cpu chat --continue` resumes it.")

    def _warm_up(self) -> None:
        """Compute what is known of the next prompt, if there is time while a person types."""
        if self._source.interactive:
            messages = common.with_system(self.conversation.system, self.conversation.messages)
            with contextlib.suppress(UserError):  # the reply will show it
                self.warmup.start(self.model.prompt(messages, self._tools, reply=False).ids)

    def handle(self, line: str) -> None:
        """One line of the user: a command or a message."""
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/") or "/" in word[1:] or "\n" in word:
            # `//text` says `/text` to the model; a path is not a command
            self.say(line[1:] if line.startswith("//") else line)
            return
        from kimi_cpu.cli.chat_commands import COMMANDS

        known = COMMANDS.get(word.lower())
        if known is None:
            near = difflib.get_close_matches(word.lower(), COMMANDS, 1, 0.5)
            hint = f"Did you mean {near[0]}?" if near else "/help lists the commands."
            print_error(f"there is no command {word}", hint)
            return
        try:
            known.run(self, rest.strip())
        except UserError as error:
            print_error(error.message, error.hint)

    def say(self, text: str) -> None:
        """Send a message and show the reply."""
        self._retries = 0
        self.conversation.messages.append({"role": "user", "content": text})
        self._answer(self.params)

    def retry(self) -> bool:
        """Answer the last message again, another way; False when there is none."""
        text = self.conversation.undo()
        if text is None:
            return False
        self._retries += 1
        params = self.params
        if params.temperature == 0:
            note(f"Temperature 0 would say the same again: this once it is {RETRY_TEMPERATURE}.")
            params = replace(params, temperature=RETRY_TEMPERATURE)
        if params.seed is not None:
            params = replace(params, seed=params.seed + self._retries)
        self.conversation.messages.append({"role": "user", "content": text})
        self._answer(params)
        return True

    def start(self, conversation: Conversation) -> None:
        """Go on with another conversation."""
        self.conversation = conversation
        self._retries = 0

    def save(self) -> None:
        """Keep the conversation on disk; an error is shown and the chat goes on."""
        if not self._save or not (self.conversation.messages or self.conversation.name):
            return
        self.conversation.model = self.model.name
        try:
            self.store.save(self.conversation)
        except UserError as error:
            print_error(error.message, error.hint)

    def recall(self) -> None:
        """Show the end of a conversation that is resumed."""
        conversation = self.conversation
        note(f"Resumed {conversation.name}: {conversation.title}")
        last: dict[str, str] = {}
        for message in conversation.messages:
            if message.get("content") and message["role"] in ("user", "assistant"):
                last[message["role"]] = str(message["content"])
        for role, mark in (("user", ">>>"), ("assistant", "   ")):
            if role in last:
                text = last[role].strip()
                note(f"{mark} {text if len(text) <= 400 else text[:399] + '…'}")

    def _answer(self, params: SamplingParams) -> None:
        """Reply to the conversation, calling tools in between; leaves it consistent and saved."""
        messages = self.conversation.messages
        try:
            for _ in range(MAX_TOOL_ROUNDS):
                result, message = self._reply(params)
                messages.append(message)
                calls = message.get("tool_calls")
                if result is None or result.finish_reason != "tool_calls" or not calls:
                    break
                if not self._results(calls):
                    break
            else:
                note(f"Stopped after {MAX_TOOL_ROUNDS} rounds of tool calls.")
        except UserError as error:
            print_error(error.message, error.hint)
            if messages and messages[-1]["role"] == "user":
                messages.pop()  # no reply came of it
        self.save()
        if self._source.interactive:
            note("")

    def _reply(self, params: SamplingParams) -> tuple[Result | None, dict[str, Any]]:
        """One reply, shown; the result is None when a second Ctrl-C broke it off."""
        from kimi_cpu.chat.generate import Result
        from kimi_cpu.cli.prompting import Interrupt
        from kimi_cpu.cli.reply import ReplyView

        view = ReplyView()
        result: Result | None = None
        experts = self.model.expert_stats()
        messages = common.with_system(self.conversation.system, self.conversation.messages)
        try:
            with Interrupt(self._source.interactive) as stop:
                for event in common.reply_events(
                    self.model, messages, self._tools, params, stop.is_set, self.warmup
                ):
                    view.show(event)
                    if isinstance(event, Result):
                        result = event
        except KeyboardInterrupt:
            if not self._source.interactive:
                raise
        finally:
            view.close()
        if result is None:
            note("stopped")
            return None, {"role": "assistant", "content": view.content}
        self._count(result)
        if result.finish_reason != "tool_calls" or not self._only_builtins(result):
            after = self.model.expert_stats()
            note(common.footer(result, after - experts if after and experts else None))
        # an empty reply is still a turn: the template needs text
        return result, {**result.message, "content": result.message.get("content") or ""}

    def _only_builtins(self, result: Result) -> bool:
        calls = result.message.get("tool_calls", ())
        return all(call["function"]["name"] in self._builtin_names for call in calls)

    def _results(self, calls: list[dict[str, Any]]) -> bool:
        """Add the results of these calls to the conversation; False when the user broke off."""
        from kimi_cpu.chat.tools import run_builtin

        going_on = True
        for call in calls:
            function = call["function"]
            if function["name"] in self._builtin_names:
                text = run_builtin(function["name"], function["arguments"]) or ""
                note(common.call_line(call, text))
            elif going_on:
                note(f"The model calls {common.call_line(call)}")
                try:
                    text = self._source.ask(f"result of {printable(function['name'])} (or empty): ")
                except KeyboardInterrupt:
                    going_on = False
            if not going_on:
                text = "error: the user stopped this call"
            self.conversation.messages.append(
                {"role": "tool", "tool_call_id": call["id"], "content": text}
            )
        return going_on

    def _count(self, result: Result) -> None:
        totals, usage = self.totals, result.usage
        totals.replies += 1
        totals.prompt_tokens += usage.prompt_tokens
        totals.cached_tokens += usage.cached_tokens
        totals.completion_tokens += usage.completion_tokens
        totals.decode_s += result.timings.total_s - result.timings.first_token_s
