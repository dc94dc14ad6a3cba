"""Regular expressions of schemas: from ECMAScript's dialect into what llguidance reads.

Readers of the JSON will match by ECMAScript's rules or by those of their language, Python's for
one: `\\W` holds é in the one and not in the other. What a mask lets through should match by either,
so the classes that differ are narrowed to what both hold. What Rust's syntax, which llguidance
reads, takes for something else (set operations, classes within classes, flags, `[]`) is refused.

And derivre 0.3, below llguidance, has an error in its `json_quote`: a set of characters that holds
all control characters is taken to hold `"` and the backslash too, so `^[^"]*$` lets quotes through.
So U+0001, which JSON text of ours cannot spell anyway, is taken out of every negated class, and
patterns that name it are refused.
"""

from __future__ import annotations

import re
from itertools import product

MAX_CHARS = 2000
#: As good as any number: larger counts are left to llguidance as lengths.
_MOST = 1 << 20
#: Characters before the end that may be missing, since each doubles the pattern.
_MAX_OPTIONAL = 3

_GROUP = re.compile(r"\(\?(?!:|i:|i\)|P?<[A-Za-z_])")
_POSSESSIVE = re.compile(r"[*+?}]\+")
_ESCAPE = re.compile(
    r"\\(?:[pP](?:\{[^}]*\}|.)|[xuU]\{[^}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)",
    re.DOTALL,
)
_CONTROL = re.compile(r"\\(?:[xuU]\{0*[01]\}|x0[01]|u000[01]|U0000000[01])|[\x00\x01]")
# One character of an adapted pattern, and how often it comes.
_ATOM = re.compile(r"\[(?:[^\]\\]|\\.)+\]|\\[wd]|\\[^A-Za-z0-9]|[^\\^$.|?*+()\[\]{}]", re.DOTALL)
_TIMES = re.compile(r"(?:([?*+])|\{(\d{1,6})(?:(,)(\d{1,6})?)?\})?(?![?*+{])")
_REST = r"[^\x01]"  # any that can be written
# The categories with control characters in them, and what may be a property other than a script's.
_OTHER = {"c", "cc", "cf", "cn", "co", "cs", "other", "control", "cntrl"}
_SCRIPT = re.compile(r"(?:script|sc|scriptextensions|scx)=\w+|[a-z]+")

# What a negated class must leave out, so that it matches by either dialect.
_OUTSIDE = {"w": r"\p{L}\p{M}\p{N}\p{Pc}", "d": r"\p{Nd}", "s": r"\s\u{FEFF}"}
_BLANK = (
    r"\t-\r \u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}"  # ECMAScript's
)
_ANY = r"[^\n\r\u{2028}\u{2029}\x01]"


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
            part = f"[{_BLANK}]" if part == "\\s" else _complement(part)
        elif pattern[at] == ".":
            part, at = _ANY, at + 1
        else:
            part, at = pattern[at], at + 1
            if _CONTROL.match(part):
                raise ValueError("control characters in patterns are not supported")
            if parts and _POSSESSIVE.fullmatch(parts[-1] + part):
                raise ValueError("possessive repetition in patterns is not supported")
        parts.append(part)
    return "".join(parts)


def with_lengths(pattern: str, low: int, high: int | None) -> str | None:
    """An adapted pattern that takes minLength and maxLength over, where only its end may vary.

    The same strings match; llguidance is many times as fast with one expression as with the
    intersection of two. None if that cannot be said, or if nothing matches.
    """
    atoms = _atoms(pattern)
    if atoms is None or max(low, high or 0) >= _MOST:
        return None
    *before, (kind, least, most) = atoms
    if sum(a != b for _, a, b in before) > _MAX_OPTIONAL or any(b - a > 1 for _, a, b in before):
        return None
    options = []
    for counts in product(*(sorted({a, b}) for _, a, b in before)):
        length = sum(counts)
        begin = max(least, low - length)
        end = most if high is None else min(most, high - length)
        if begin <= end:
            head = [f"{before[i][0]}{{{n}}}" for i, n in enumerate(counts) if n]
            options.append("".join(head) + f"{kind}{{{begin},{end if end < _MOST else ''}}}")
    return f"^(?:{'|'.join(options)})$" if options else None


def _atoms(pattern: str) -> list[tuple[str, int, int]] | None:
    """The characters of a pattern from `^` on, each with the bounds of its count; None if it has
    more than that."""
    atoms = []
    at = 1
    while at < len(pattern) and pattern[at:] != "$":
        atom = _ATOM.match(pattern, at)
        times = atom and _TIMES.match(pattern, atom.end())
        if not (atom and times):
            return None
        sign, exact, open_end, upper = times.groups()
        least = int(exact or sign not in ("?", "*"))
        if sign in ("*", "+") or (open_end and not upper):
            most = _MOST
        else:
            most = int(upper or exact or 1)
        if max(least, most) > _MOST:
            return None
        atoms.append((atom[0], least, most))
        at = times.end()
    if not pattern.endswith("$") or at == len(pattern):
        atoms.append((_REST, 0, _MOST))
    return atoms if pattern[:1] == "^" and atoms else None


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
            if negated:
                part = _OUTSIDE.get(part[1:], part)
            else:
                part = _BLANK if part == "\\s" else _complement(part)
        else:
            if pattern[at] == "[" or pattern[at : at + 2] in ("&&", "--", "~~"):
                raise ValueError("set operations in patterns are not supported")
            if not negated and _CONTROL.match(pattern[at]):
                raise ValueError("control characters in patterns are not supported")
            part, at = pattern[at], at + 1
        body.append(part)
    inner = "".join(body)
    return (f"[^{inner}\\x01]" if negated else f"[{inner}]"), at + 1


def _complement(escape: str) -> str:
    """`\\W`, `\\D`, `\\S` and `\\P{...}` as a negated class; other escapes as they are."""
    kind, name = escape[1], escape[2:]
    if kind in "WDS" and not name:
        return f"[^{_OUTSIDE[kind.lower()]}\\x01]"
    return f"[^\\p{name}\\x01]" if kind == "P" else escape


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
