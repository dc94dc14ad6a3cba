"""The streaming Markdown renderer and the line breaker, on a pretended terminal."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.cli.markdown import MarkdownStream
from kimi_cpu.cli.terminal import char_widths, printable

B, D, IT, C, R = "\x1b[1m", "\x1b[2m", "\x1b[3m", "\x1b[36m", "\x1b[0m"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def render(*parts: str) -> str:
    screen = Screen()
    markdown = MarkdownStream(screen)
    for part in parts:
        markdown.feed(part)
    markdown.close()
    return screen.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", render(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a **b** c", f"a {B}b {R}c"),
        ("a *b*", f"a {IT}b{R}"),
        ("`a*b`", f"{C}a*b{R}"),
        ("# T\nx", f"{B}# T{R}\nx"),
        ("- x\n* y\n+ z", "• x\n• y\n• z"),
        ("1. x", "1. x"),
        ("> q", f"{D}│ q{R}"),
        ("```py\na * b\n```\nz", f"{D}```py{R}\n{C}a * b{R}\n{D}```{R}\nz"),
        ("---\n", f"{D}{'─' * 40}{R}\n"),
        ("2*3*4 = 24, a_b_c, 2 * 3", "2*3*4 = 24, a_b_c, 2 * 3"),
        ("-5", "-5"),
        ("391", "391"),
        ("**bold", f"{B}bold{R}"),
        ("**b\nc", f"{B}b{R}\nc"),
        ("***x***", f"{B}{IT}x{R}"),
        ("| a | b |", "| a | b |"),
        ("\x1b[31mred", "␛[31mred"),
    ],
)
def test_rendering(text, shown):
    assert render(text) == shown


@settings(max_examples=150, deadline=None)
@given(st.text("ab *_`#->1.\n~é你", max_size=60), st.integers(0, 60))
def test_the_pieces_do_not_matter(text, cut):
    assert render(text) == render(text[:cut], text[cut:]) == render(*text)


@settings(max_examples=150, deadline=None)
@given(st.text("abc d1,.é\n", max_size=300))
def test_ordinary_text_stays_but_for_line_breaks(text):
    shown = plain(text)
    assert re.sub(r"\s+", "", shown) == re.sub(r"\s+", "", text)
    assert all(char_widths(line) <= 80 for line in shown.split("\n") if " " in line.strip())


def test_words_are_not_broken():
    words = "somewhat longer words than usual " * 10
    lines = plain(words).split("\n")
    assert len(lines) > 4 and all(len(line) <= 80 for line in lines)
    assert " ".join(line.strip() for line in lines) == words.strip()
    assert plain("- " + words).split("\n")[1].startswith("  "), "hanging indent"


def test_words_appear_when_they_are_over():
    screen = Screen()
    markdown = MarkdownStream(screen)
    markdown.feed("one two")
    assert screen.getvalue() == "one"
    markdown.feed(" ")
    assert screen.getvalue() == "one two"


def test_printable():
    assert printable("a\tb\nc\x07\x9b\u202ed\x7f") == "a\tb\nc␇�d␡"
