"""Kimi's tokenizer: text and control tokens have separate entries.

`encode_text` knows ordinary ranks only, so no text, whatever it spells, becomes a control token;
control ids are asked for by name (`control("<|im_end|>")`) by the code that lays out a
conversation. The byte-pair merging is the `tiktoken` package's, built from two files of the
checkpoint that are checked line by line first: `tiktoken.model` (base64 token and rank a line)
and `tokenizer_config.json` (the names of the 256 control ids that follow the ranks).
"""

from __future__ import annotations

import binascii
import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimi_cpu.errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken

RANKS_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
N_CONTROL = 256

# The largest published files are 2.8 MB and 10 KB; these bounds only stop nonsense early.
MAX_RANKS_BYTES = 64 << 20
MAX_CONFIG_BYTES = 16 << 20

# Kimi's split pattern, in the dialect of tiktoken's regex engine (`&&` intersects classes).
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Kimi's own code cuts text like this before it encodes. The cuts show in the ids, so they are
# part of the format; they also bound what the regex engine and the merging ever see at once.
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")

_HINT = "Take the tokenizer files from the model's own repository again."


class Tokenizer:
    """Ranks 0 .. n_ranks-1 are text; n_ranks .. n_vocab-1 are the 256 control ids."""

    def __init__(self, ranks: dict[bytes, int], control_names: dict[int, str]) -> None:
        """Build from checked parts; `Tokenizer.load` reads and checks the files.

        `ranks` maps every token's bytes to its id, 0 .. len(ranks)-1 without gaps;
        `control_names` names some of the 256 ids that follow, the others get reserved names.
        """
        self.n_ranks = len(ranks)
        self.n_vocab = self.n_ranks + N_CONTROL
        control_ids = range(self.n_ranks, self.n_vocab)
        names = [control_names.get(i, f"<|reserved_token_{i}|>") for i in control_ids]
        self.special_tokens: dict[str, int] = dict(zip(names, control_ids, strict=True))
        self._bytes: list[bytes] = sorted(ranks, key=ranks.__getitem__)
        self._bytes += [name.encode("utf-8") for name in names]
        self._encoding = _build_encoding(ranks, self.special_tokens)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `tiktoken.model` and `tokenizer_config.json` of a checkpoint folder.

        Raises TokenizerError naming the file, and the line or id, of the first thing wrong.
        """
        ranks = _read_ranks(Path(folder) / RANKS_FILE)
        names = _read_control_names(Path(folder) / CONFIG_FILE, len(ranks))
        return cls(ranks, names)

    def encode_text(self, text: str) -> list[int]:
        """The ids of ordinary text, never a control id whatever the text spells.

        Lone surrogates, which no UTF-8 text can hold, count as U+FFFD. Time is close to linear
        in the length, also for long runs of one character.
        """
        ids: list[int] = []
        for part in _cut(replace_surrogates(text)):
            ids += self._encoding.encode_ordinary(part)
        return ids

    def control(self, name: str) -> int:
        """The id of a control token by its spelling; TokenizerError if there is none."""
        try:
            return self.special_tokens[name]
        except KeyError:
            raise TokenizerError(
                f"the tokenizer has no control token {name!r}",
                f"Its {CONFIG_FILE} must name it under added_tokens_decoder.",
            ) from None

    def is_control(self, token_id: int) -> bool:
        """Whether an id is one of the 256 control ids."""
        return self.n_ranks <= token_id < self.n_vocab

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token (of a control token: its spelling). TokenizerError if unknown."""
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(
                f"token id {token_id} lies outside the tokenizer's 0..{self.n_vocab - 1}",
                "The model and the tokenizer files may be of different checkpoints.",
            )
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int], *, keep_control: bool = True) -> str:
        """The text of ids; invalid UTF-8 becomes U+FFFD.

        Control tokens appear as their spelling, or not at all with `keep_control=False`.
        """
        parts = (self.token_bytes(i) for i in ids if keep_control or not self.is_control(i))
        return b"".join(parts).decode("utf-8", "replace")


class StreamDecoder:
    """Turns ids into text as they come, in whole characters only.

    A character whose bytes lie in several tokens is held back until it is complete; bytes that
    can no longer become one are emitted as U+FFFD. Control tokens never show.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often all of its own, sometimes empty."""
        if self._tokenizer.is_control(token_id):
            return self.flush()
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End the text: an unfinished character comes out as U+FFFD. Usable again afterwards."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _build_encoding(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> tiktoken.Encoding:
    # Imported here so that the command line starts without it. An Encoding made from ranks in
    # memory touches neither the network nor tiktoken's download cache.
    import tiktoken

    return tiktoken.Encoding(
        "kimi",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=special_tokens,
    )


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Through UTF-16, so that a pair of halves (from JSON escapes, say) is one character.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _cut(text: str) -> Iterator[str]:
    """The parts that are encoded one by one: see MAX_ENCODE_CHARS and MAX_RUN_CHARS."""
    for start in range(0, len(text), MAX_ENCODE_CHARS):
        chunk = text[start : start + MAX_ENCODE_CHARS]
        if len(chunk) <= MAX_RUN_CHARS:
            yield chunk
            continue
        cut = 0
        for run in _RUN.finditer(chunk):
            for at in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield chunk[cut:at]
                cut = at
        yield chunk[cut:]


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(_read(path, MAX_RANKS_BYTES).split(b"\n"), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
            raise _error(path, f"line {number} is not 'BASE64 RANK'")
        try:
            token = binascii.a2b_base64(fields[0], strict_mode=True)
        except binascii.Error as error:
            raise _error(path, f"line {number}: wrong base64 ({error})") from None
        if not token:
            raise _error(path, f"line {number}: the token is empty")
        rank = int(fields[1])
        if rank in line_of_rank:
            first = line_of_rank[rank]
            raise _error(path, f"line {number}: rank {rank} was given in line {first} already")
        if token in ranks:
            first = line_of_rank[ranks[token]]
            raise _error(path, f"line {number}: the token was given in line {first} already")
        ranks[token] = rank
        line_of_rank[rank] = number
    if not ranks:
        raise _error(path, "holds no tokens")
    top = max(line_of_rank)
    if top != len(ranks) - 1:
        gap = next(rank for rank in range(top) if rank not in line_of_rank)
        raise _error(path, f"no line has rank {gap}, yet line {line_of_rank[top]} has rank {top}")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise _error(path, f"no token for the single byte 0x{byte:02x}")
    return ranks


def _read_control_names(path: Path, n_ranks: int) -> dict[int, str]:
    try:
        config = json.loads(
            _read(path, MAX_CONFIG_BYTES).decode("utf-8"), object_pairs_hook=_unique_keys
        )
    except (ValueError, RecursionError) as error:
        raise _error(path, f"is not valid JSON ({error})") from None
    entries = config.get("added_tokens_decoder") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise _error(path, "has no added_tokens_decoder object")
    names: dict[int, str] = {}
    id_of_name: dict[str, int] = {}
    low, high = n_ranks, n_ranks + N_CONTROL - 1
    for key, entry in entries.items():
        where = f"added_tokens_decoder[{key!r}]"
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key):
            raise _error(path, f"{where}: the key is not a token id")
        token_id = int(key)
        if not low <= token_id <= high:
            raise _error(path, f"{where}: control ids are {low}..{high} for {n_ranks} ranks")
        name = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or name != replace_surrogates(name):
            raise _error(path, f"{where}: content is not a name")
        if name in id_of_name:
            raise _error(path, f"{where}: id {id_of_name[name]} has the name {name!r} already")
        names[token_id] = name
        id_of_name[name] = token_id
    for token_id in range(low, high + 1):
        reserved = f"<|reserved_token_{token_id}|>"
        if token_id not in names and reserved in id_of_name:
            where = f"added_tokens_decoder['{id_of_name[reserved]}']"
            raise _error(path, f"{where}: {reserved!r} is the name of id {token_id}")
    return names


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is given twice")
            seen.add(key)
    return result


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise TokenizerError(
            f"{path}: cannot be read ({error.strerror or error})",
            f"A checkpoint folder needs {RANKS_FILE} and {CONFIG_FILE} beside the weights.",
        ) from None
    if len(data) > max_bytes:
        raise _error(path, f"is larger than {max_bytes >> 20} MB")
    return data


def _error(path: Path, what: str) -> TokenizerError:
    return TokenizerError(f"{path}: {what}", _HINT)
