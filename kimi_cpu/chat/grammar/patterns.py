"""Regular expressions of schemas: from ECMAScript's dialect into what llguidance reads.

llguidance reads patterns by Rust's syntax, which gives some texts another meaning (set operations
and classes within classes, flags, `[]`): those are refused. And it has one error, in derivre 0.3's
`json_quote`: a set of characters that holds every control character is taken to hold `"` and the
backslash too, so `^[^"]*$` would let quotes through. So U+0001, which JSON text of ours cannot
spell anyway, is taken out of every negated class, and patterns that name it are refused.
"""

from __future__ import annotations

import re

MAX_CHARS = 2000

_GROUP = re.compile(r"\(\?(?!:|i:|i\)|P?<[A-Za-z_])")
_POSSESSIVE = re.compile(r"[*+?}]\+")
_ESCAPE = re.compile(
    r"\\(?:[pP](?:\{[^}]*\}|.)|[xuU]\{[^}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)",
    re.DOTALL,
)
_CONTROL = re.compile(r"\\(?:[xuU]\{0*[01]\}|x0[01]|u000[01]|U0000000[01])|[\x00\x01]")
# The categories with control characters in them, and what may be a property other than a script's.
_OTHER = {"c", "cc", "cf", "cn", "co", "cs", "other", "control", "cntrl"}
_SCRIPT = re.compile(r"(?:script|sc|scriptextensions|scx)=\w+|[a-z]+")


def adapted(pattern: str) -> str:
    """The pattern as llguidance should get it. Raises ValueError with the reason if it cannot."""
    if len(pattern) > MAX_CHARS:
        raise ValueError(f"the pattern is longer than {MAX_CHARS:,} characters")
    if _GROUP.search(_ESCAPE.sub("", pattern)):
        raise ValueError("lookaround and flags in patterns are not supported")
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        if pattern[at] == "[":
            part, at = _class(pattern, at)
        elif pattern[at] == "\\":
            part, at = _escape(pattern, at)
            if part.startswith("\\P"):
                part = f"[^\\p{part[2:]}\\x01]"
        else:
            part, at = pattern[at], at + 1
            if _CONTROL.match(part):
                raise ValueError("control characters in patterns are not supported")
            if parts and _POSSESSIVE.fullmatch(parts[-1] + part):
                raise ValueError("possessive repetition in patterns is not supported")
        parts.append(part)
    return "".join(parts)


def _class(pattern: str, start: int) -> tuple[str, int]:
    """The class that begins at `start`, and where it ends."""
    at = start + 1
    negated = pattern[at : at + 1] == "^"
    at += negated
    if pattern[at : at + 1] == "]":
        raise ValueError("empty classes in patterns are not supported")
    body: list[str] = []
    while pattern[at : at + 1] != "]":
        if at >= len(pattern):
            raise ValueError("a class in the pattern is not closed")
        if pattern[at] == "\\":
            part, at = _escape(pattern, at, negated)
            if part.startswith("\\P") and not negated:
                raise ValueError("\\P within a class of a pattern is not supported")
        else:
            if pattern[at] == "[" or pattern[at : at + 2] in ("&&", "--", "~~"):
                raise ValueError("set operations in patterns are not supported")
            if not negated and _CONTROL.match(pattern[at]):
                raise ValueError("control characters in patterns are not supported")
            part, at = pattern[at], at + 1
        body.append(part)
    inner = "".join(body)
    return (f"[^{inner}\\x01]" if negated else f"[{inner}]"), at + 1


def _escape(pattern: str, start: int, negated: bool = False) -> tuple[str, int]:
    found = _ESCAPE.match(pattern, start)
    if found is None:
        raise ValueError("the pattern ends in a backslash")
    text = found[0]
    if text[1] in "pP":
        name = text[2:].strip("{}").lower().replace("_", "").replace("-", "").replace(" ", "")
        if name in _OTHER or not _SCRIPT.fullmatch(name):
            raise ValueError(f"{text[:40]} in patterns is not supported")
    elif not negated and _CONTROL.fullmatch(text):
        raise ValueError("control characters in patterns are not supported")
    return text, found.end()
