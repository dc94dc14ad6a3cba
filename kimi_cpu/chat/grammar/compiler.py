"""Grammars over a tokenizer's vocabulary: llguidance, with limits and a bounded cache."""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kimi_cpu.chat.grammar.schema import GrammarError
from kimi_cpu.errors import UsageError
from kimi_cpu.sampling import AllowedBits
from kimi_cpu.tokenizer import N_CONTROL, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits
    from llguidance._lib import JsonCompileOptions

#: Compiled grammars kept for each tokenizer: how many, and of how much source text in all.
CACHE_ENTRIES = 256
CACHE_CHARS = 1 << 20

_JSON_OPTIONS: JsonCompileOptions = {
    # One blank or one indented line break wherever JSON allows them: without a bound, a model
    # that falls into a loop writes blanks for ever.
    "whitespace_pattern": r" |\n[ \t]{0,32}",
    # Without \uXXXX, since "\u0061" would be a second spelling of a declared property "a".
    "json_allowed_escapes": 'nrbtf\\"',
}


#: Sets of tokens that llguidance allows at once where all of them fit, beside its own of whatever
#: a JSON string may hold: without them each length of a bounded pattern costs a walk through the
#: vocabulary. The last: beyond ASCII, but for blanks, which `\S` and `.` leave out.
_SLICES = (
    "[a-z]{1,10}",
    "[a-zA-Z0-9_]{1,10}",
    "[a-zA-Z0-9_ .,-]{1,10}",
    r"[^\x00-\x7F\u{85}\u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}"
    r"\u{FEFF}]{1,6}",
)


def _limits() -> LLParserLimits:
    """llguidance's own limits; beyond them a matcher stops with an error.

    Fuel is work while compiling (1 M: some 20 ms) and for a token's mask (200 K: some 14 ms);
    a lexer state takes 1-2 KB; an object has up to four items in a row for each property, and a
    mask up to a hundred for each in all (100 K: 70 ms, for as many properties as there may be).
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=50_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=100_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,  # they would quote the schema
    )


class _Words:
    """A tokenizer as llguidance wants to see it.

    Control tokens are empty words, which match nothing: no grammar here ever contains one, and no
    text can spell one. Which of them may come is decided in `constraint.py`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.n_ranks  # required, and masked out again
        self.bos_token_id = None
        texts = [tokenizer.token_bytes(i) for i in range(tokenizer.n_ranks)]
        self.tokens: Sequence[bytes] = texts + [b""] * N_CONTROL
        self.special_token_ids: Sequence[int] = ()
        self._encode = tokenizer.encode_text

    def __call__(self, text: bytes) -> list[int]:
        """Asked for text that is forced, which so comes in the tokens the model expects."""
        return self._encode(text.decode("utf-8", "replace"))


class Vocabulary:
    """One tokenizer's tables for masks, and the grammars compiled over it.

    Masks are bits, uint32 [ceil(n_vocab / 32)], the lowest bit of the first word for token 0.
    Safe to use from any thread.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise UsageError(
                "structured output and tool calls by schema need the package llguidance",
                "Install the extra: pip install 'kimi-cpu[server]'.",
            ) from None
        self.tokenizer = tokenizer
        words = _Words(tokenizer)
        self._ll = LLTokenizer(
            TokenizerWrapper(words),
            n_vocab=tokenizer.n_vocab,
            slices=[*LLTokenizer.general_slices(), *_SLICES],
        )
        self.text = self.bits(range(tokenizer.n_ranks))
        self._too_long = _digit_masks(words.tokens)
        self._cache: OrderedDict[str, LLMatcher] = OrderedDict()
        self._cached_chars = 0
        self._lock = threading.Lock()

    def bits(self, ids: Sequence[int]) -> AllowedBits:
        """The mask that allows these ids."""
        allowed = np.zeros(self.tokenizer.n_vocab, np.bool_)
        allowed[list(ids)] = True
        return _packed(allowed)

    def allowed_text(self, matcher: LLMatcher) -> AllowedBits:
        """The mask of the text tokens that a matcher allows next. The matcher may fail."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)
        return np.bitwise_and(bits[: self.text.size], self.text)

    def digits_beyond(self, room: int) -> AllowedBits | None:
        """The mask of tokens that begin with more than `room` digits; None if there are none."""
        return self._too_long.get(room)

    def json(self, schema: str, where: str) -> LLMatcher:
        """A matcher of JSON text that follows a schema (prepared, see `schema.py`).

        Raises GrammarError naming `where`.
        """
        from llguidance import LLMatcher

        def source() -> str:
            return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)

        return self._matcher(f"json {schema}", source, where)

    def choice(self, texts: Sequence[str], where: str) -> LLMatcher:
        """A matcher of one of several texts."""
        from llguidance import LLMatcher

        key = json.dumps(list(texts), ensure_ascii=False)

        def source() -> str:
            options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            return LLMatcher.grammar_from_lark(f"start: {options}")

        return self._matcher(f"text {key}", source, where)

    def _matcher(self, key: str, source: Callable[[], str], where: str) -> LLMatcher:
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
                # a copy shares nothing that moves, so what one reply does shows in no other
                return found.deep_copy()
        made = self._compile(source, where)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = made
                self._cached_chars += len(key)
            while len(self._cache) > CACHE_ENTRIES or self._cached_chars > CACHE_CHARS:
                old, _ = self._cache.popitem(last=False)
                self._cached_chars -= len(old)
            return made.deep_copy()

    def _compile(self, source: Callable[[], str], where: str) -> LLMatcher:
        from llguidance import LLMatcher

        try:
            made = LLMatcher(self._ll, source(), log_level=0, limits=_limits())
        except ValueError as error:
            raise GrammarError(where, _first_line(str(error))) from None
        if made.is_error():
            raise GrammarError(where, _first_line(made.get_error()))
        # Some schemas that nothing fulfils, or whose first token is too costly, show only here.
        probe = made.deep_copy()
        some = self.allowed_text(probe).any()
        if probe.is_error() or not (some or probe.is_accepting()):
            reason = "" if not probe.is_error() else f" ({_first_line(probe.get_error())})"
            raise GrammarError(where, f"nothing can be written that fulfils it{reason}")
        return made


@functools.lru_cache(maxsize=2)
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer's vocabulary: made at the first call, in 0.5 s and 110 MB at 160K tokens."""
    return Vocabulary(tokenizer)


def _digit_masks(words: Sequence[bytes]) -> dict[int, AllowedBits]:
    """room -> mask of the words that begin with more digits than room."""
    leading = np.zeros(len(words), np.int32)
    for i, word in enumerate(words):
        if word[:1].isdigit():
            leading[i] = len(word) - len(word.lstrip(b"0123456789"))
    return {room: _packed(leading > room) for room in range(int(leading.max()))}


def _packed(allowed: NDArray[np.bool_]) -> AllowedBits:
    words = np.zeros(-(-allowed.size // 32) * 4, np.uint8)
    words[: -(-allowed.size // 8)] = np.packbits(allowed, bitorder="little")
    return words.view("<u4")


def _first_line(text: str) -> str:
    """llguidance's reason, in one line."""
    if text.startswith("oneOf constraints"):
        return "the options of a oneOf may overlap, which is not supported: use anyOf"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return " ".join(line for line in lines if not line.startswith("<"))[:160]
