"""What makes masks quick changes none: slices of the vocabulary, and lengths within patterns."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.chat.grammar import compiler, schema
from kimi_cpu.chat.grammar.patterns import adapted, with_lengths
from kimi_cpu.tokenizer import Tokenizer
from tools.synthetic_tokenizer import tokenizer_files

llguidance = pytest.importorskip("llguidance")


@pytest.mark.parametrize(
    ("pattern", "low", "high", "merged"),
    [
        ("^[a-z]*$", 2, 9, "[a-z]{2,9}"),
        ("^[a-z]+$", 0, 9, "[a-z]{1,9}"),
        ("^[a-z]+$", 3, None, "[a-z]{3,}"),
        (r"^\w{2,60}$", 5, 40, r"\w{5,40}"),
        (r"^\w{2,60}$", 1, 99, r"\w{2,60}"),
        (r"^\d{4}$", 0, 9, r"\d{4,4}"),
        (r"^\d{4,}$", 0, 9, r"\d{4,9}"),
        (r"^[\w\]\[ -]*$", 0, 8, r"[\w\]\[ -]{0,8}"),
        ("^é?$", 1, 3, "é{1,1}"),
        ("^[a-z]{0}$", 0, 5, "[a-z]{0,0}"),
        # what comes before the end
        ("^[A-Z_][A-Z0-9_]*$", 0, 9, "[A-Z_]{1}[A-Z0-9_]{0,8}"),
        (r"^v\d{2}\.x+$", 8, None, r"v{1}\d{2}\.{1}x{4,}"),
        ("^ab?c*$", 2, 3, "a{1}c{1,2}|a{1}b{1}c{0,1}"),
        ("^ab?c*$", 0, 1, "a{1}c{0,0}"),
        # no end: anything follows
        ("^/", 0, 9, r"/{1}[^\x01]{0,8}"),
        (r"^a\$", 0, 9, r"a{1}\${1}[^\x01]{0,7}"),
        # as it is: nothing fulfils it, or more than a count is asked for
        ("^[a-z]{6,}$", 0, 5, None),
        ("^abc", 0, 2, None),
        ("[a-z]*", 0, 5, None),
        ("[a-z]*$", 0, 5, None),
        ("^[a-z]*", 0, 5, None),
        ("^[a-z]*?$", 0, 5, None),
        ("^([a-z])*$", 0, 5, None),
        ("^a|b*$", 0, 5, None),
        (r"^\b*$", 0, 5, None),
        (r"^\1*$", 0, 5, None),
        ("^(?i:a)*$", 0, 5, None),
        ("^[a-z]*[0-9]*$", 0, 5, None),
        ("^a?b?c?d?e*$", 0, 5, None),
        ("^a{2,1}$", 0, 5, None),
        ("^", 3, 5, r"[^\x01]{3,5}"),
        ("^$", 0, 5, None),
        ("", 0, 5, None),
        ("^[a-z]*$", 0, 10**400, None),
    ],
)
def test_lengths_in_a_pattern(pattern: str, low: int, high: int | None, merged: str | None) -> None:
    expected = None if merged is None else f"^(?:{merged})$"
    assert with_lengths(adapted(pattern), low, high) == expected


KINDS = st.sampled_from(["[a-c]", "[^a]", "b", r"\w", r"\d", ".", r"[\]b]", r"[^\s]", r"\S", r"\."])
TIMES = st.sampled_from(["", "?", "*", "+", "{2}", "{1,}", "{1,3}", "{0,2}", "{1,2}"])
PATTERNS = st.builds(
    lambda parts, end: "^" + "".join(kind + times for kind, times in parts) + end,
    st.lists(st.tuples(KINDS, TIMES), max_size=4),
    st.sampled_from(["$", ""]),
)
TEXTS = st.text("abc].1 é", max_size=6)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, st.integers(0, 4), st.none() | st.integers(0, 5), st.lists(TEXTS, max_size=20))
def test_the_same_strings_match(pattern: str, low: int, high: int | None, texts: list[str]) -> None:
    pattern = adapted(pattern)
    merged = with_lengths(pattern, low, high)
    if merged is not None:
        for text in texts:
            fits = low <= len(text) <= (len(text) if high is None else high)
            assert _matches(merged, text) == (_matches(pattern, text) and fits)


def _matches(pattern: str, text: str) -> bool:
    pattern = re.sub(r"\\u\{(\w\w)\}", r"\\x\1", pattern)  # Rust's escapes as Python's
    pattern = re.sub(r"\\u\{(\w+)\}", r"\\u\1", pattern)
    return re.search(re.sub(r"\$$", r"\\Z", pattern), text) is not None


SCHEMAS: dict[str, Any] = {
    "class": {"type": "string", "pattern": r"^[\w .,-]*$", "minLength": 3, "maxLength": 40},
    "any": {"type": "string", "pattern": "^.+$", "maxLength": 30},
    "not blank": {"type": "string", "pattern": r"^\S{1,25}$"},
    "no markup": {"type": ["string", "null"], "pattern": "^[^<>]*$", "maxLength": 30},
    "slug": {"type": "string", "pattern": "^[a-z0-9-]*$", "minLength": 1, "maxLength": 30},
    "name": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]{0,30}$", "maxLength": 20},
    "address": {"type": "string", "pattern": "^https?://", "maxLength": 40},
    "path": {"type": "string", "pattern": r"^[a-z]:?/.*$", "minLength": 4, "maxLength": 30},
    "search and length": {"type": "string", "pattern": "a.c", "maxLength": 20},
    "length": {"type": "string", "minLength": 2, "maxLength": 12},
    "free": {"type": "object", "additionalProperties": {"type": "string"}},
    "date": {"type": "string", "format": "date"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    for name, data in tokenizer_files(8192, 4096).items():
        (folder / name).write_bytes(data)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def bare(tokenizer: Tokenizer) -> compiler.Vocabulary:
    """Masks by a walk through all tokens, each of them."""
    words = compiler.Vocabulary(tokenizer)
    words._ll = words._ll.with_slices([])
    return words


@pytest.mark.parametrize("name", SCHEMAS)
def test_masks_are_the_same(tokenizer: Tokenizer, bare: compiler.Vocabulary, name: str) -> None:
    listed = {"type": "array", "items": SCHEMAS[name]}
    quick = compiler.vocabulary(tokenizer).json(schema.prepare(listed, "x"), "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "_merge_lengths", lambda result: None)
        plain = bare.json(schema.prepare(listed, "x"), "x")
    rng = random.Random(name)
    for _ in range(3):
        a, b = quick.deep_copy(), plain.deep_copy()
        for _ in range(40):
            mask = a.compute_bitmask()
            assert mask == b.compute_bitmask()
            assert a.is_accepting() == b.is_accepting()
            ids = [i for i in _ids(mask) if i < tokenizer.n_ranks]
            if not ids:
                break
            token = rng.choice(ids)
            assert a.consume_token(token) and b.consume_token(token)


def _ids(mask: bytes) -> Iterator[int]:
    yield from np.flatnonzero(
        np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    ).tolist()
