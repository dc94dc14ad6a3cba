"""What the terminal can do, and writing to it: colours, wrapping, a status line.

Text of a model or a file is made harmless first (`printable`): it cannot move the cursor, change
the title or hide text. Nothing here writes an escape sequence to a pipe, to a `dumb` terminal or,
colours and styles, under NO_COLOR.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from typing import TextIO

RESET, BOLD, DIM, ITALIC = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[3m"
RED, CYAN = "\x1b[31m", "\x1b[36m"

# Control characters become visible; bidirectional overrides, which reorder what one reads, vanish.
_HARMLESS: dict[int, str | None] = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)}
_HARMLESS |= {127: "␡", **dict.fromkeys(range(0x80, 0xA0), "�")}
_HARMLESS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], None)


def printable(text: str) -> str:
    """The text without terminal control: newlines and tabs stay."""
    return text.translate(_HARMLESS)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def has_colour(stream: TextIO) -> bool:
    """Whether styles may be written to this stream."""
    return moves_cursor(stream) and not os.environ.get("NO_COLOR")


def moves_cursor(stream: TextIO) -> bool:
    """Whether the stream is a terminal that understands escape sequences."""
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def width_of(stream: TextIO) -> int:
    """Columns of the terminal, 80 when unknown."""
    return shutil.get_terminal_size((80, 24)).columns if is_terminal(stream) else 80


def styled(text: str, style: str, stream: TextIO) -> str:
    """The text in a style where the stream can show it."""
    return f"{style}{text}{RESET}" if style and has_colour(stream) else text


def error_text(message: str, hint: str = "") -> str:
    """`error: ...` and `hint: ...`, a line each, for stderr."""
    text = ""
    for label, style, part in (("error:", RED + BOLD, message), ("hint:", BOLD, hint)):
        if part:
            line = printable(part).replace("\n", "␊")  # a file's name may hold one
            text += f"{styled(label, style, sys.stderr)} {line}\n"
    return text


def print_error(message: str, hint: str = "") -> None:
    """`error_text` on stderr."""
    _say(error_text(message, hint), end="")


def note(text: str) -> None:
    """One dim line on stderr: something said by the way."""
    _say(styled(printable(text), DIM, sys.stderr))


def tell(text: str) -> None:
    """A line on stderr that the user asked for."""
    _say(printable(text))


def _say(text: str, end: str = "\n") -> None:
    """A line on stderr. If it cannot be written (a log on a full disk), the work goes on."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except BrokenPipeError:  # whoever listened has left
        raise
    except OSError:
        pass


class Status:
    """A line on stderr that is replaced and finally erased; silent without a terminal."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, text: str) -> None:
        if moves_cursor(sys.stderr):
            line = printable(text)[: width_of(sys.stderr) - 1]
            sys.stderr.write(f"\r\x1b[2K{styled(line, DIM, sys.stderr)}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False


class Flow:
    """Streams styled text to a terminal, breaking lines between words.

    A word is held back until it ends, so nothing that was shown ever has to be redrawn.
    `indent` is put before the lines that a break begins.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colour = has_colour(stream)
        self._word: list[tuple[str, str]] = []
        self._word_width = 0
        self._spaces = 0
        self._column = 0
        self._style = ""
        self.indent = ""

    @property
    def at_line_start(self) -> bool:
        return self._column == 0 and not self._word and not self._spaces

    def text(self, text: str, style: str = "", wrap: bool = True) -> None:
        """Append harmless text without newlines."""
        if not wrap:
            self.flush()
            self._write(text, style)
            return
        for char in text:
            if char == " ":
                self._end_word()
                self._spaces += 1
                continue
            width = char_width(char)
            if width == 2:  # scripts without spaces break anywhere
                self._end_word()
            self._word.append((style, char))
            self._word_width += width
            if width == 2:
                self._end_word()

    def newline(self) -> None:
        self._end_word()
        self._set_style("")
        self._stream.write("\n")
        self._column = self._spaces = 0
        self.indent = ""

    def flush(self) -> None:
        """Write what is held back, spaces included."""
        self._end_word()
        if self._spaces:
            self._write(" " * self._spaces, self._style)
            self._spaces = 0
        self._stream.flush()

    def close(self) -> None:
        """End the styles; the cursor stays where it is."""
        self._end_word()
        self._set_style("")
        self._stream.flush()

    def _end_word(self) -> None:
        if not self._word:
            return
        width = width_of(self._stream)
        if self._column + self._spaces + self._word_width > width and self._column > 0:
            if self._column > char_widths(self.indent):  # else breaking gains nothing
                self._set_style("")
                self._stream.write("\n")
                self._column = 0
                self._write(self.indent, "")
        else:
            self._write(" " * self._spaces, self._style)
        self._spaces = 0
        for style, char in self._word:
            self._write(char, style)
        self._word, self._word_width = [], 0

    def _write(self, text: str, style: str) -> None:
        if text:
            self._set_style(style)
            self._stream.write(text)
            self._column += char_widths(text)

    def _set_style(self, style: str) -> None:
        if self._colour and style != self._style:
            self._stream.write((RESET if self._style else "") + style)
            self._style = style


def char_width(char: str) -> int:
    """Terminal columns of one character."""
    if char < "\x7f":
        return 1
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def char_widths(text: str) -> int:
    """Terminal columns of a text."""
    return sum(map(char_width, text))
