"""Where the chat's lines come from: an editor on a terminal, plain lines in a pipe."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from kimi_cpu.cli.terminal import is_terminal, moves_cursor, note

PROMPT = ">>> "
HISTORY = "history"


class Source(Protocol):
    """Lines for the chat. `read` raises EOFError at the end."""

    interactive: bool

    def read(self) -> str: ...
    def ask(self, question: str) -> str: ...


class LineSource:
    """Lines of stdin; with a terminal only on one side, the prompt goes to stderr."""

    def __init__(self) -> None:
        self.interactive = is_terminal(sys.stdin)
        if hasattr(sys.stdin, "reconfigure"):  # bytes that are not text must not end the chat
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> str:
        while True:
            try:
                return self._line(PROMPT)
            except KeyboardInterrupt:  # the terminal dropped the line; the chat goes on
                if not self.interactive:
                    raise
                sys.stderr.write("\n")

    def ask(self, question: str) -> str:
        try:
            return self._line(question)
        except EOFError:
            return ""

    def _line(self, prompt: str) -> str:
        if self.interactive:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            if self.interactive:  # Ctrl-D leaves the cursor behind the prompt
                sys.stderr.write("\n")
            raise EOFError
        return line.rstrip("\r\n")


class EditorSource:
    """prompt_toolkit: history, completion of commands, pasted text in one piece."""

    interactive = True

    def __init__(self, folder: Path, commands: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.shortcuts import CompleteStyle

        names = sorted(commands)

        class Commands(Completer):
            def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
                text = document.text_before_cursor
                if text.startswith("/") and " " not in text and "\n" not in text:
                    for name in names:
                        if name.startswith(text):
                            yield Completion(name, start_position=-len(text))

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _newline(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        history: History = InMemoryHistory()
        path = folder / HISTORY
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            history = FileHistory(str(path))
        except OSError as error:
            note(f"No history is kept: {path}: {error.strerror or error}")
        # Asking the terminal for the cursor's position gains little, its answer may end up among
        # the text, and terminals without it get a warning.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=Commands(),
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=keys,
            reserve_space_for_menu=0,
        )
        self._plain: PromptSession[str] = PromptSession()
        self._hinted = False

    def read(self) -> str:
        while True:
            try:
                return self._session.prompt(PROMPT, prompt_continuation="... ")
            except KeyboardInterrupt:  # the line is cleared; the chat goes on
                if not self._session.default_buffer.text and not self._hinted:
                    note("Ctrl-D or /exit leaves.")
                    self._hinted = True

    def ask(self, question: str) -> str:
        try:
            return self._plain.prompt(question)
        except EOFError:
            return ""


def open_source(folder: Path, commands: Iterable[str]) -> Source:
    """The editor when a person types on a terminal that can show it, else plain lines."""
    if is_terminal(sys.stdin) and moves_cursor(sys.stdout):
        return EditorSource(folder, commands)
    return LineSource()


class Interrupt:
    """While entered, the first Ctrl-C only sets a flag; the second is a KeyboardInterrupt."""

    def __init__(self, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._event = threading.Event()
        self._previous: Callable[[int, FrameType | None], Any] | int | None = None

    def is_set(self) -> bool:
        return self._event.is_set()

    def __enter__(self) -> Self:
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous or signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
