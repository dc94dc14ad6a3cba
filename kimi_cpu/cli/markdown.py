"""Markdown for a terminal, rendered as it streams and never redrawn.

Redrawing a growing reply (a live view) flickers and duplicates lines once it scrolls, so this
renderer only appends: each character is written in its final style as soon as that is certain,
which takes at most the current word or the marks at a line's beginning. Known are headings,
bullet and numbered lists, quotes, rules, fenced code, `code`, **bold** and *italic*; everything
else (tables, links, formulas) stays as the model wrote it.
"""

from __future__ import annotations

import re
from typing import TextIO

from kimi_cpu.cli.terminal import BOLD, CYAN, DIM, ITALIC, Flow, char_widths, printable

# What may still turn into a block mark when more characters come.
_MAYBE_MARK = re.compile(r" {0,12}(#{0,6}|`{0,}[\w+.-]*|~{0,}|[-*_]{0,}|\+|\d{1,3}[.)]?|>)$")
_FENCE = re.compile(r"( {0,12})(`{3,}|~{3,})([^`]*)$")
_RULE = re.compile(r" {0,3}(-{3,}|\*{3,}|_{3,})\s*$")
_HEADING = re.compile(r" {0,3}#{1,6} $")
_BULLET = re.compile(r"( {0,12})([-*+]) $")
_NUMBER = re.compile(r"( {0,12})(\d{1,3}[.)]) $")
_QUOTE = re.compile(r" {0,3}>$")


class MarkdownStream:
    """Feed text in pieces; it appears on the stream as it is decided. End with `close`."""

    def __init__(self, stream: TextIO) -> None:
        self._flow = Flow(stream)
        self._line = ""  # the marks at a line's beginning while undecided
        self._in_marks = True
        self._run = ""  # `***` or ``` `` ``` whose next character is not here yet
        self._before = " "  # the character before it
        self._fence = ""  # the marks that close the code block we are in
        self._code = ""  # the marks that close the code span we are in
        self._bold = self._italic = False
        self._block = ""  # style of the whole line

    def feed(self, text: str) -> None:
        for char in printable(text):
            if self._in_marks:
                self._marks(char)
            elif char == "\n":
                self._end_line()
            elif self._fence:
                self._flow.text(char, CYAN, wrap=False)
            else:
                self._inline(char)

    def close(self) -> None:
        """Write what is held back and end the styles; the cursor may be inside a line."""
        if self._in_marks and self._line:
            if self._fence and _closes(self._line, self._fence):
                self._flow.text(self._line, DIM)
            else:
                self._release()
        self._end_run(" ")
        self._flow.close()

    @property
    def at_line_start(self) -> bool:
        """Whether the cursor is at the beginning of a line."""
        return self._flow.at_line_start

    def _marks(self, char: str) -> None:
        """The beginning of a line: hold it back while it may be a block mark."""
        if char == "\n":
            self._whole_line(self._line)
            return
        self._line += char
        line = self._line
        if self._fence:
            if not re.fullmatch(r" *[`~]*[ \t]*", line):
                self._in_marks, self._line = False, ""
                self._flow.text(line, CYAN, wrap=False)
            return
        if _HEADING.match(line):
            self._begin(line, BOLD, BOLD, 0)
        elif found := _BULLET.match(line):
            self._begin(f"{found[1]}• ", "", "", len(found[1]) + 2)
        elif _NUMBER.match(line):
            self._begin(line, "", "", len(line))
        elif _QUOTE.match(line):
            self._begin("│", DIM, DIM, 2)
        elif not (_MAYBE_MARK.match(line) or _FENCE.match(line)):
            self._release()

    def _begin(self, mark: str, mark_style: str, block: str, indent: int) -> None:
        self._in_marks, self._line, self._block = False, "", block
        self._flow.text(mark, mark_style, wrap=False)
        self._flow.indent = " " * indent
        self._before = " "

    def _release(self) -> None:
        """What was held back is ordinary text after all."""
        line, self._line, self._in_marks = self._line, "", False
        self._before = " "
        if not self._fence:
            body = line.lstrip(" ")
            lead = line[: len(line) - len(body)]
            self._flow.text(lead, wrap=False)
            self._flow.indent = " " * char_widths(lead)
            for char in body:
                self._inline(char)
        else:
            self._flow.text(line, CYAN, wrap=False)

    def _whole_line(self, line: str) -> None:
        """A line that was held back to its end."""
        fence = _FENCE.match(line)
        if self._fence:
            closes = _closes(line, self._fence)
            self._flow.text(line, DIM if closes else CYAN, wrap=False)
            if closes:
                self._fence = ""
        elif fence:
            self._fence = fence[2]
            self._flow.text(line, DIM, wrap=False)
        elif _RULE.match(line):
            self._flow.text("─" * 40, DIM, wrap=False)
        elif line:
            self._release()
        self._end_line()

    def _end_line(self) -> None:
        self._end_run(" ")
        self._flow.newline()
        self._in_marks, self._line = True, ""
        self._block = self._code = ""
        self._bold = self._italic = False
        self._before = " "

    def _inline(self, char: str) -> None:
        if self._run and char != self._run[0]:
            self._end_run(char)
        if char == "`" or (char in "*_" and not self._code):
            self._run += char
            return
        self._plain(char)

    def _plain(self, text: str) -> None:
        if text:
            self._flow.text(text, self._style())
            self._before = text[-1]

    def _style(self) -> str:
        if self._code:
            return CYAN
        emphasis = (BOLD if self._bold else "") + (ITALIC if self._italic else "")
        return self._block + emphasis

    def _end_run(self, after: str) -> None:
        """Decide a run of marks now that the character after it is known."""
        run, self._run = self._run, ""
        if not run:
            return
        if run[0] == "`":
            if run == self._code:
                self._code = ""
            elif self._code or len(run) > 2:
                self._plain(run)
            else:
                self._code = run
            return
        # As in CommonMark, but never inside a word or a formula: 2*3 and snake_case stay.
        opens = not after.isspace() and not self._before.isalnum()
        closes = not self._before.isspace() and (run[0] == "*" or not after.isalnum())
        if len(run) == 2 and (closes if self._bold else opens):
            self._bold = not self._bold
        elif len(run) == 1 and (closes if self._italic else opens):
            self._italic = not self._italic
        elif len(run) == 3 and (closes if self._bold and self._italic else opens):
            self._bold = self._italic = not (self._bold and self._italic)
        else:
            self._plain(run)
            return
        self._before = run[-1]


def _closes(line: str, fence: str) -> bool:
    marks = line.strip()
    return len(marks) >= len(fence) and set(marks) == {fence[0]}
