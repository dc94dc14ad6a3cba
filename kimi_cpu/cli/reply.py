"""Shows a reply while it is generated: reasoning dim on stderr, the answer on stdout.

On a terminal the answer is rendered Markdown; in a pipe it is the model's text, unchanged. The
reasoning is shown to a person only: it never goes into a pipe.
"""

from __future__ import annotations

import sys

from kimi_cpu.chat.generate import Result
from kimi_cpu.chat.parser import Content, Event, Reasoning
from kimi_cpu.cli.markdown import MarkdownStream
from kimi_cpu.cli.terminal import DIM, Flow, has_colour, is_terminal, printable


class ReplyView:
    """Feed it the events of one reply, then `close`; `content` is the answer so far."""

    def __init__(self, *, show_reasoning: bool = True) -> None:
        self._answer_tty = is_terminal(sys.stdout)
        self._markdown = MarkdownStream(sys.stdout) if has_colour(sys.stdout) else None
        self._flow = Flow(sys.stderr) if show_reasoning and is_terminal(sys.stderr) else None
        self._reasoning_shown = False
        self._section = ""  # "reasoning" or "content": what was written last
        self._last = "\n"
        self._leading = True
        self.content = ""

    def show(self, event: Event | Result) -> None:
        if isinstance(event, Reasoning):
            self._reasoning(event.text)
        elif isinstance(event, Content):
            self.content += event.text
            self._content(event.text)

    def close(self) -> None:
        """End the last line."""
        self._end_reasoning()
        if self._section == "content":
            if self._markdown is not None:
                self._markdown.close()
                if not self._markdown.at_line_start:
                    sys.stdout.write("\n")
            elif self._last != "\n":
                sys.stdout.write("\n")
        sys.stdout.flush()

    def _reasoning(self, text: str) -> None:
        if self._flow is None:
            return
        if not self._reasoning_shown:
            text = text.lstrip()
        if not text:
            return
        self._reasoning_shown = True
        self._section = "reasoning"
        for number, line in enumerate(printable(text).split("\n")):
            if number:
                self._flow.newline()
            self._flow.text(line, DIM)
        sys.stderr.flush()

    def _end_reasoning(self) -> None:
        if self._section == "reasoning" and self._flow is not None:
            self._flow.close()
            if not self._flow.at_line_start:
                self._flow.newline()
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._section = ""

    def _content(self, text: str) -> None:
        if self._leading:
            if self._answer_tty:
                text = text.lstrip("\n")  # a blank line follows the reasoning anyhow
            self._leading = not text
        if not text:
            return
        self._end_reasoning()
        self._section = "content"
        if self._markdown is not None:
            self._markdown.feed(text)
        else:
            if self._answer_tty:
                text = printable(text)
            sys.stdout.write(text)
        self._last = text[-1]
        sys.stdout.flush()
