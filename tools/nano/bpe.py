"""Ranks for a ``tiktoken.model``: frequent whole words, then byte pairs, and the file formats."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Kimi's special tokens at their offsets behind the ranks; the rest are reserved.
SPECIAL_OFFSETS = {
    "[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3, "<|im_assistant|>": 4,
    "<|start_header_id|>": 6, "<|end_header_id|>": 7, "[EOT]": 9, "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11, "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13, "<|tool_call_argument_begin|>": 14, "<|tool_call_end|>": 15,
    "<|im_middle|>": 17, "<think>": 22, "</think>": 23, "[UNK]": 254, "[PAD]": 255,
}  # fmt: skip
_NOT_SPECIAL = {
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<think>", "</think>",
}  # fmt: skip


def split(text: str) -> list[str]:
    """``text`` cut by the Kimi pattern."""
    return regex.findall(PATTERN, text, flags=regex.V1)


def train_ranks(texts: Iterable[str], size: int, whole_words: int) -> list[bytes]:
    """``size`` tokens: 256 bytes, then frequent words as wholes, then merges; no digit merges.

    tiktoken looks a piece up as a whole before it merges pairs, so a word needs no chain of
    intermediate merges, which keeps a small vocabulary small.
    """
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(piece.encode() for piece in split(text))
    counts = Counter({p: n for p, n in counts.items() if not any(48 <= c <= 57 for c in p)})
    tokens = [bytes([i]) for i in range(256)]
    ranked = sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p], p))
    words = ranked[:whole_words]
    pairs_from = {p: [p[i : i + 1] for i in range(len(p))] for p in ranked[whole_words:]}
    known = set(tokens) | set(words)
    merges: list[bytes] = []
    while len(tokens) + len(words) + len(merges) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for piece, parts in pairs_from.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[piece]
        if not pairs:
            raise ValueError(f"the corpus gives only {len(merges)} merges")
        best = min(pairs, key=lambda p: (-pairs[p], p))
        joined = best[0] + best[1]
        if joined not in known:
            known.add(joined)
            merges.append(joined)
        for parts in pairs_from.values():
            i = 0
            while i + 1 < len(parts):
                if parts[i] == best[0] and parts[i + 1] == best[1]:
                    parts[i : i + 2] = [joined]
                i += 1
    return tokens + merges + words


def write_ranks(path: Path, tokens: list[bytes]) -> None:
    """Write ``tiktoken.model``: base64 of the token and its rank, one a line."""
    lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
    path.write_text("".join(lines))


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a ``tiktoken.model`` in the order of their ranks."""
    pairs = [line.split() for line in path.read_text().splitlines() if line]
    return [base64.b64decode(t) for t, _ in sorted(pairs, key=lambda p: int(p[1]))]


def special_names(n_ranks: int) -> dict[int, str]:
    """Names of the 256 special ids behind the ranks."""
    names = {n_ranks + i: f"<|reserved_token_{n_ranks + i}|>" for i in range(256)}
    return names | {n_ranks + offset: name for name, offset in SPECIAL_OFFSETS.items()}


def write_tokenizer_config(path: Path, n_ranks: int, max_length: int) -> None:
    """Write ``tokenizer_config.json`` in the published form, named tokens only."""
    decoder = {
        str(n_ranks + offset): {
            "content": name, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": name not in _NOT_SPECIAL,
        }
        for name, offset in SPECIAL_OFFSETS.items()
    }  # fmt: skip
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [
            n for n in SPECIAL_OFFSETS if n.startswith("<|") and n not in _NOT_SPECIAL
        ],
        "bos_token": "[BOS]", "clean_up_tokenization_spaces": False, "eos_token": "[EOS]",
        "extra_special_tokens": {}, "model_max_length": max_length, "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer", "unk_token": "[UNK]",
    }  # fmt: skip
    path.write_text(json.dumps(config, indent=2) + "\n")


class Codec:
    """Text and control tokens of one set of ranks."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.n_ranks = len(tokens)
        self.names = special_names(self.n_ranks)
        self.ids = {name: i for i, name in self.names.items()}
        self._encoding = tiktoken.Encoding(
            "nano", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)},
            special_tokens={},
        )  # fmt: skip
        self._cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return self.n_ranks + 256

    def text(self, text: str) -> list[int]:
        """Ids of ordinary text; short strings are remembered."""
        found = self._cache.get(text)
        if found is None:
            found = self._encoding.encode_ordinary(text)
            if len(self._cache) < 20_000:
                self._cache[text] = found
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Readable form of a mixed sequence, control tokens by name."""
        out, run = [], []
        for i in ids:
            if i < self.n_ranks:
                run.append(i)
            else:
                out += [self._encoding.decode(run), self.names[i]]
                run = []
        return "".join(out) + self._encoding.decode(run)
