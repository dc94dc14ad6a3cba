"""A made-up tokenizer of any size, so that a checkpoint of random weights can be served.

Its files have the published form: ranks in `tiktoken.model`, names of the 256 control ids, at the
offsets behind the ranks where Kimi's have them, in `tokenizer_config.json`. Names and chat template
are the embedded nano model's; so are the first pieces. Nothing of it is Kimi's.
"""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Iterator
from itertools import count, islice, product

from kimi_cpu.chat.template import TEMPLATE_FILE
from kimi_cpu.cli.common import embedded_model
from kimi_cpu.tokenizer import CONFIG_FILE, N_CONTROL, RANKS_FILE, Tokenizer

#: Single bytes and control ids, without which there is no tokenizer.
MIN_VOCAB = 256 + N_CONTROL

#: Letters, the frequent ones first.
_VOWELS, _CONSONANTS = "eaoiu", "tnshrdlcmwfgypbvkjxqz"


def tokenizer_files(vocab: int, max_length: int) -> dict[str, bytes]:
    """Name -> content of what a model of `vocab` >= MIN_VOCAB ids and `max_length` tokens needs."""
    n_ranks = vocab - N_CONTROL
    folder = embedded_model()
    nano = Tokenizer.load(folder)
    ranks = islice(_pieces(nano), n_ranks)
    lines = (f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(ranks))
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    config["model_max_length"] = max_length
    config["added_tokens_decoder"] = {
        str(int(i) - nano.n_ranks + n_ranks): entry
        for i, entry in config["added_tokens_decoder"].items()
    }
    return {
        RANKS_FILE: "".join(lines).encode(),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        TEMPLATE_FILE: (folder / TEMPLATE_FILE).read_bytes(),
    }


def _pieces(nano: Tokenizer) -> Iterator[bytes]:
    """Different tokens without end, the 256 bytes first, so that any number of them will do.

    All but some whole words of nano's are joined of two earlier ones, as merging wants it.
    """
    seen: set[bytes] = set()
    known = (nano.token_bytes(i) for i in range(nano.n_ranks))
    for piece in (*known, *_marks()):
        if piece not in seen:
            seen.add(piece)
            yield piece
    for piece in _words():
        if piece not in seen:
            yield piece


def _marks() -> Iterator[bytes]:
    """Numbers of two and three digits, indentation, pairs of punctuation marks."""
    for n in (2, 3):
        for digits in product(string.digits, repeat=n):
            yield "".join(digits).encode()
    for n in range(2, 33):
        yield b" " * n
    for pair in product(string.punctuation, repeat=2):
        yield "".join(pair).encode()


def _words() -> Iterator[bytes]:
    """Words of vowels and consonants in turn, the short ones first, with a blank before and
    without."""
    for n in count(1):
        for first in ((_VOWELS, _CONSONANTS), (_CONSONANTS, _VOWELS)):
            for letters in product(*((first * n)[:n])):
                word = "".join(letters).encode()
                yield b" " + word
                yield word
