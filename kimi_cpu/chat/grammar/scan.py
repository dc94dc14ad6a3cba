"""Follows JSON text byte by byte, as far as a grammar cannot: depth, and lengths of numbers."""

from __future__ import annotations

from enum import IntEnum

#: Parsers take JSON of any depth or length of numbers on paper only: Python stops at 1000 levels
#: and 4300 digits, a double rounds after 15 digits (0.99..9 reads as 1) and ends at 1e308.
MAX_DEPTH = 128
MAX_INTEGER_DIGITS = 300
MAX_DIGITS = 15
MAX_EXPONENT_DIGITS = 2

_QUOTE, _BACKSLASH = b'"\\'
_DIGITS = frozenset(b"0123456789")


class _Part(IntEnum):
    NONE = 0
    INTEGER = 1
    FRACTION = 2
    EXPONENT = 3


class JsonScan:
    """Where valid JSON text stands after the bytes pushed so far. depth: open brackets."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = False
        self._escaped = False
        self._part = _Part.NONE
        self._digits = 0

    @property
    def room(self) -> int | None:
        """How many more digits the number at the end should get; None outside of numbers."""
        match self._part:
            case _Part.NONE:
                return None
            case _Part.INTEGER:
                return max(MAX_INTEGER_DIGITS - self._digits, 0)
            case _Part.FRACTION:
                return max(MAX_DIGITS - self._digits, 0)
            case _Part.EXPONENT:
                return max(MAX_EXPONENT_DIGITS - self._digits, 0)

    def push(self, data: bytes) -> None:
        """Go on by some bytes."""
        for byte in data:
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == _BACKSLASH:
                    self._escaped = True
                elif byte == _QUOTE:
                    self._in_string = False
            elif byte in _DIGITS:
                self._digits += 1
                self._part = max(self._part, _Part.INTEGER)
            elif self._part and byte == ord("."):
                self._part = _Part.FRACTION
            elif self._part and byte in b"eE":
                self._part, self._digits = _Part.EXPONENT, 0
            elif not (self._part is _Part.EXPONENT and byte in b"+-"):
                self._part, self._digits = _Part.NONE, 0
                self._in_string = byte == _QUOTE
                self.depth += (byte in b"[{") - (byte in b"]}")
