"""The commands of the chat: lines that begin with a slash."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kimi_cpu.cli.conversations import Conversation
from kimi_cpu.cli.terminal import tell
from kimi_cpu.errors import UsageError, UserError

if TYPE_CHECKING:
    from kimi_cpu.cli.chat import Chat

SHOWN_SESSIONS = 20


@dataclass(frozen=True)
class SlashCommand:
    """usage: how it is written; help: what it does; run: given the chat and the argument."""

    usage: str
    help: str
    run: Callable[[Chat, str], None]


def _help(chat: Chat, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for name, command in COMMANDS.items():
        if name not in ALIASES:
            tell(f"  {command.usage:<{width}}  {command.help}")
    tell("  Alt-Enter begins a new line; pasted text may have several; //text sends /text.")
    tell("  Ctrl-C stops a reply and keeps what was said; Ctrl-D leaves.")


def _new(chat: Chat, argument: str) -> None:
    chat.start(Conversation(system=chat.conversation.system))
    tell("A new conversation.")


def _undo(chat: Chat, argument: str) -> None:
    text = chat.conversation.undo()
    if text is None:
        raise UsageError("there is nothing to take back", "Say something first.")
    chat.save()
    line = " ".join(text.split())
    tell(f"Taken back: {line if len(line) <= 60 else line[:59] + '…'}")


def _retry(chat: Chat, argument: str) -> None:
    if not chat.retry():
        raise UsageError("there is nothing to answer again", "Say something first.")


def _think(chat: Chat, argument: str) -> None:
    if argument in ("on", "off") or argument.isdecimal():
        budget = None if argument == "on" else 0 if argument == "off" else int(argument)
        chat.params = replace(chat.params, thinking_budget=budget)
    elif argument:
        raise UsageError(f"/think {argument} is not known", "/think on, /think off or /think 200")
    budget = chat.params.thinking_budget
    if budget is None:
        tell("Thinking is on.")
    else:
        tell(f"Thinking is limited to {budget:,} tokens." if budget else "Thinking is off.")


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation.system = "" if argument == "default" else argument
        chat.save()
    text = chat.conversation.system
    tell(f"System message: {text}" if text else "System message: the model's default.")
    if text:
        tell("/system default goes back to the model's own.")


def _save(chat: Chat, argument: str) -> None:
    conversation = chat.conversation
    if not conversation.messages:
        raise UsageError("there is nothing to save yet", "Say something first.")
    if argument:
        if argument != conversation.name and chat.store.path(argument).exists():
            raise UsageError(f"a conversation {argument!r} exists", "Choose another name.")
        conversation.name = argument
    conversation.model = chat.model.name
    chat.store.save(conversation)
    tell(f"Saved as {conversation.name}; later changes go there too.")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("/load needs a name or a number", "/sessions lists them.")
    names = chat.store.names()
    if argument.isdecimal() and len(argument) <= 3 and 1 <= int(argument) <= len(names):
        argument = names[int(argument) - 1]
    chat.start(chat.store.load(argument))
    chat.recall()


def _sessions(chat: Chat, argument: str) -> None:
    names = chat.store.names()
    if not names:
        tell("No conversations are kept yet.")
    for number, name in enumerate(names[:SHOWN_SESSIONS], 1):
        try:
            saved = chat.store.load(name)
            title, when = saved.title, _when(saved.updated)
        except UserError:
            title, when = "(damaged)", ""
        here = "*" if name == chat.conversation.name else " "
        tell(f"{here}{number:>3}  {name:<18} {when:<16}  {title}")
    if len(names) > SHOWN_SESSIONS:
        tell(f"      and {len(names) - SHOWN_SESSIONS} older ones in {chat.store.folder}")


def _when(stamp: str) -> str:
    try:
        return dt.datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return stamp[:16]


def _stats(chat: Chat, argument: str) -> None:
    totals, engine, session = chat.totals, chat.model.engine, chat.model.session
    speed = totals.completion_tokens / totals.decode_s if totals.decode_s > 0 else 0.0
    used, limit = len(session), engine.config.max_position_embeddings
    rows = {
        "model": f"{chat.model.name} ({engine.precision}, {engine.threads} threads)",
        "conversation": chat.conversation.name or "not saved yet",
        "context": f"{used:,} of {limit:,} tokens, {session.cache_bytes / 1e6:.1f} MB of latents",
        "replies": f"{totals.replies}, {totals.completion_tokens:,} tokens, {speed:.1f} tok/s",
        "prompts": f"{totals.prompt_tokens:,} tokens, {totals.cached_tokens:,} of them reused",
    }
    experts = chat.model.expert_stats()
    if experts is not None:
        rows["experts"] = (
            f"{engine.experts.capacity:,} in memory, {experts.hit_rate:.0%} of uses there, "
            f"{experts.read_bytes / 1e9:.1f} GB read ({engine.experts.io}), "
            f"{experts.wait_s:.1f} s waited"
        )
    for name, text in rows.items():
        tell(f"  {name:<12}  {text}")


def _exit(chat: Chat, argument: str) -> None:
    chat.running = False


COMMANDS: dict[str, SlashCommand] = {
    "/help": SlashCommand("/help", "this list", _help),
    "/new": SlashCommand("/new", "begin a new conversation", _new),
    "/undo": SlashCommand("/undo", "take back the last message and its reply", _undo),
    "/retry": SlashCommand("/retry", "answer the last message again", _retry),
    "/think": SlashCommand("/think on|off|N", "reason first, never, or up to N tokens", _think),
    "/system": SlashCommand("/system TEXT", "instructions for the model", _system),
    "/save": SlashCommand("/save [NAME]", "save now, under a name", _save),
    "/load": SlashCommand("/load NAME", "go on with a saved conversation", _load),
    "/sessions": SlashCommand("/sessions", "list the saved conversations", _sessions),
    "/stats": SlashCommand("/stats", "tokens, speed and context used", _stats),
    "/exit": SlashCommand("/exit", "leave (also Ctrl-D)", _exit),
}
#: Other words for a command; accepted, not listed.
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/clear": "/new", "/?": "/help"}
COMMANDS |= {alias: COMMANDS[name] for alias, name in ALIASES.items()}
