"""Tokenizers for the text tests: a small one made here, and Kimi's real one when it is at hand."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from kimi_cpu.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

# Offsets of the control tokens from the first control id, as in K2 Thinking's files.
CONTROL_NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}

_MERGES = [
    "th",
    "he",
    "the",
    "in",
    "an",
    "er",
    "ou",
    "",
    "t",
    "",
    "a",
    "ll",
    "10",
    "func",
    "functions.",
    "im",
    "<|",
    "|>",
    "im_",
    "<|im_",
    "tool",
    "🙂",
    "é",
    "汉字",
]


def small_ranks() -> list[bytes]:
    """Single bytes, then tokens each of which is the join of two earlier ones."""
    tokens = [bytes([i]) for i in range(256)]
    for word in _MERGES:
        data = word.encode()
        for end in range(2, len(data) + 1):
            if data[:end] not in tokens:
                tokens.append(data[:end])
    return tokens


def ranks_text(tokens: list[bytes]) -> bytes:
    lines = [base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)]
    return b"".join(lines)


def config_text(n_ranks: int) -> str:
    entries = {str(n_ranks + i): {"content": name} for i, name in CONTROL_NAMES.items()}
    return json.dumps({"added_tokens_decoder": entries})


def write_small(folder: Path) -> Path:
    tokens = small_ranks()
    (folder / "tiktoken.model").write_bytes(ranks_text(tokens))
    (folder / "tokenizer_config.json").write_text(config_text(len(tokens)))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_small(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def kimi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like K2 Thinking's: K2 Instruct's names and the two think tokens."""
    if not (SHARED / "tiktoken.model").exists():
        pytest.skip("the real vocabulary is not at hand")
    folder = tmp_path_factory.mktemp("kimi")
    (folder / "tiktoken.model").write_bytes((SHARED / "tiktoken.model").read_bytes())
    config = json.loads((SHARED / "kimi-k2-instruct" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["163606"] = {"content": "<think>"}
    config["added_tokens_decoder"]["163607"] = {"content": "</think>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def kimi_tokenizer(kimi_folder: Path) -> Tokenizer:
    return Tokenizer.load(kimi_folder)
