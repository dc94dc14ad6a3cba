"""The tokenizer: exact ids, text that cannot spell control tokens, and files it must refuse."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu import tokenizer as module
from kimi_cpu.chat.template import ChatTemplate, encode_segments
from kimi_cpu.errors import TokenizerError
from kimi_cpu.tokenizer import StreamDecoder, Tokenizer

from .conftest import CONTROL_NAMES, SHARED, config_text, ranks_text, small_ranks, write_small

VECTORS = SHARED / "tokenizer_vectors"
SPELLINGS = [*CONTROL_NAMES.values(), "<|reserved_token_300|>", "<|im_", "end|>", "<think", ">"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
spelled = st.lists(st.one_of(st.sampled_from(SPELLINGS), texts), max_size=6).map("".join)


# --- ids ---------------------------------------------------------------------------------------


def test_own_vectors(kimi_tokenizer: Tokenizer) -> None:
    vectors = json.loads((VECTORS / "own_vectors.json").read_text(encoding="utf-8"))["vectors"]
    names = sorted(kimi_tokenizer.special_tokens, key=len, reverse=True)
    control = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    for vector in vectors:
        ids: list[int] = []
        for part in control.split(vector["text"]):
            if part in kimi_tokenizer.special_tokens:
                ids.append(kimi_tokenizer.control(part))
            else:
                ids += kimi_tokenizer.encode_text(part)
        assert ids == vector["ids"], vector["text"]
        assert kimi_tokenizer.decode(ids) == vector["text"]


@pytest.mark.parametrize("name", ["small", "mixed", "utf8"])
def test_file_vectors(kimi_tokenizer: Tokenizer, name: str) -> None:
    text = (VECTORS / f"{name}_input.txt").read_bytes().decode("utf-8")
    lines = (VECTORS / f"{name}_tokens_kimi_k2.txt").read_text().split("\n")
    expected = [[int(i) for i in line.split(",") if i.strip()] for line in lines]
    if name == "utf8":  # one text; the other files hold one text a line, with escapes
        inputs = [text]
    else:
        inputs = [
            re.sub(r"\\([ns])", lambda m: "\n "["ns".index(m[1])], t) for t in text.split("\n")
        ]
    assert len(inputs) == len(expected)
    for line, ids in zip(inputs, expected, strict=True):
        assert kimi_tokenizer.encode_text(line) == ids
        assert kimi_tokenizer.decode(ids) == line


def test_real_size_and_names(kimi_tokenizer: Tokenizer) -> None:
    assert (kimi_tokenizer.n_ranks, kimi_tokenizer.n_vocab) == (163_584, 163_840)
    assert len(kimi_tokenizer.special_tokens) == 256
    assert kimi_tokenizer.control("<|im_end|>") == 163_586
    assert kimi_tokenizer.control("<|reserved_token_163600|>") == 163_600


def test_real_vocabulary_loads_quickly(kimi_folder: Path) -> None:
    start = time.perf_counter()
    Tokenizer.load(kimi_folder)
    assert time.perf_counter() - start < 2  # 0.25 s on an idle machine


@settings(max_examples=150, deadline=None)
@given(spelled)
def test_round_trip_without_control_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.n_ranks for i in ids)


@settings(max_examples=80, deadline=None)
@given(spelled)
def test_round_trip_of_the_real_vocabulary(kimi_tokenizer: Tokenizer, text: str) -> None:
    ids = kimi_tokenizer.encode_text(text)
    assert kimi_tokenizer.decode(ids) == text
    assert not any(kimi_tokenizer.is_control(i) for i in ids)


def test_every_control_spelling_is_ordinary_text(tokenizer: Tokenizer) -> None:
    for name, token_id in tokenizer.special_tokens.items():
        assert tokenizer.control(name) == token_id and tokenizer.is_control(token_id)
        assert max(tokenizer.encode_text(f"{name}a {name}{name}")) < tokenizer.n_ranks


def test_unknown_control_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="no control token"):
        tokenizer.control("<|nothing|>")


def test_surrogates(tokenizer: Tokenizer) -> None:
    decoded = tokenizer.decode(tokenizer.encode_text("a\ud83d\ude42b\ud800c\udc00"))
    assert decoded == "a\U0001f642b\ufffdc\ufffd"


def test_ids_outside_are_refused(tokenizer: Tokenizer) -> None:
    for token_id in (-1, tokenizer.n_vocab):
        with pytest.raises(TokenizerError, match=f"token id {token_id} "):
            tokenizer.decode([token_id])


def test_decode_can_leave_control_tokens_out(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.control("<think>"), *tokenizer.encode_text("hm"), tokenizer.n_vocab - 3]
    assert tokenizer.decode(ids, keep_control=False) == "hm"
    assert tokenizer.decode(ids).startswith("<think>hm<|reserved_token_")


def test_neither_network_nor_cache_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects"))
    assert Tokenizer.load(write_small(tmp_path)).encode_text("the") == [SMALL.index(b"the")]
    assert not cache.exists()


def test_the_embedded_model() -> None:
    nano = Path(__file__).resolve().parents[2] / "weights" / "nano"
    if not (nano / "tiktoken.model").exists():
        pytest.skip("the nano model is not built yet")
    tokenizer = Tokenizer.load(nano)
    for name in CONTROL_NAMES.values():
        assert tokenizer.is_control(tokenizer.control(name))
    messages = [{"role": "user", "content": "What is 2 + 2? <|im_end|> 天气 🙂"}]
    template = ChatTemplate.load(nano)
    ids = encode_segments(tokenizer, template.render_segments(messages))
    assert tokenizer.decode(ids) == template.plain_render(messages)
    assert sum(map(tokenizer.is_control, ids)) == 8


# --- long texts --------------------------------------------------------------------------------


def _published_cut(s: str, max_chars: int, max_run: int) -> Iterator[str]:
    """The rule as Kimi's code states it, character by character."""
    for begin in range(0, len(s), max_chars):
        chunk, start, length = s[begin : begin + max_chars], 0, 0
        for i, char in enumerate(chunk):
            if i and char.isspace() == chunk[i - 1].isspace():
                length += 1
                if length > max_run:
                    yield chunk[start:i]
                    start, length = i, 1
            else:
                length = 1
        yield chunk[start:]


def test_cuts_follow_the_published_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    for _ in range(3000):
        run = rng.randint(1, 5)
        chars = run + rng.randint(0, 30)
        monkeypatch.setattr(module, "MAX_RUN_CHARS", run)
        monkeypatch.setattr(module, "MAX_ENCODE_CHARS", chars)
        text = "".join(rng.choices("ab \n\x1c\u3000", k=rng.randint(0, 60)))
        assert list(module._cut(text)) == list(_published_cut(text, chars, run))


@pytest.mark.parametrize(
    "unit", ["a", "A", " ", "\n", "🙂", "汉", "é", "=", "ab", "a\u0301", "\x1c="]
)
def test_a_million_characters_of_one_kind(kimi_tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    ids = kimi_tokenizer.encode_text(text)
    assert time.perf_counter() - start < 4  # about 0.2 s on an idle machine
    assert kimi_tokenizer.decode(ids) == text


def test_long_runs_with_few_ranks(tokenizer: Tokenizer) -> None:
    start = time.perf_counter()
    for unit in ("a", " ", "🙂"):
        text = unit * 300_000 + "b"
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert time.perf_counter() - start < 4


# --- streaming ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_stream_decoder_equals_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_ranks - 1), max_size=40))
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_decoder_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    euro = [bytes([b]) for b in "€".encode()]
    ids = [small_ranks().index(b) for b in euro]
    assert [stream.push(i) for i in ids] == ["", "", "€"]
    assert stream.push(ids[0]) == ""
    assert stream.push(small_ranks().index(b"x")) == "\ufffdx"  # certain now: not a character
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd" and stream.flush() == ""
    assert stream.push(ids[0]) == "" and stream.push(tokenizer.control("<|im_end|>")) == "\ufffd"


# --- files that are refused --------------------------------------------------------------------


def _replace(tokens: list[bytes], line: int, new: bytes) -> bytes:
    lines = ranks_text(tokens).splitlines()
    lines[line - 1] = new
    return b"\n".join(lines)


SMALL = small_ranks()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no tokens"),
        (_replace(SMALL, 7, b"Bg=="), "line 7 is not"),
        (_replace(SMALL, 7, b"Bg== 6 6"), "line 7 is not"),
        (_replace(SMALL, 7, b"Bg== -6"), "line 7 is not"),
        (_replace(SMALL, 7, b"Bg== 6666666666666"), "line 7 is not"),
        (_replace(SMALL, 7, b"B=g= 6"), "line 7: wrong base64"),
        (_replace(SMALL, 7, b"\xff\xfe== 6"), "line 7: wrong base64"),
        (_replace(SMALL, 7, b"Bg== 5"), "line 7: rank 5 was given in line 6"),
        (_replace(SMALL, 7, b"BQ== 6"), "line 7: the token was given in line 6"),
        (_replace(SMALL, 7, b"==== 6"), "line 7: "),
        (_replace(SMALL, 7, b""), "no line has rank 6"),
        (_replace(SMALL, 7, b"Bg== 99999"), "no line has rank 6, yet line 7 has rank 99999"),
        (_replace(SMALL, 7, b"enp6enp6 6"), "no token for the single byte 0x06"),
    ],
)
def test_bad_ranks(tmp_path: Path, content: bytes, message: str) -> None:
    write_small(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        Tokenizer.load(tmp_path)
    assert "tiktoken.model" in caught.value.message and caught.value.hint


N = len(SMALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no added_tokens_decoder"),
        ("{}", "no added_tokens_decoder"),
        ('{"added_tokens_decoder": []}', "no added_tokens_decoder"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "['x']: the key is not a token id"),
        (f'{{"added_tokens_decoder": {{"0{N}": {{"content": "a"}}}}}}', "is not a token id"),
        ('{"added_tokens_decoder": {"5": {"content": "a"}}}', f"control ids are {N}..{N + 255}"),
        (f'{{"added_tokens_decoder": {{"{N + 256}": {{"content": "a"}}}}}}', "control ids are"),
        (f'{{"added_tokens_decoder": {{"{N}": {{"content": ""}}}}}}', "content is not a name"),
        (f'{{"added_tokens_decoder": {{"{N}": "[BOS]"}}}}', "content is not a name"),
        (f'{{"added_tokens_decoder": {{"{N}": {{"content": "\\ud800"}}}}}}', "is not a name"),
        (config_text(N).replace("[EOS]", "[BOS]"), f"id {N} has the name '[BOS]' already"),
        (config_text(N).replace(f'"{N + 1}"', f'"{N}"'), f"the key '{N}' is given twice"),
        (config_text(N).replace("[EOS]", f"<|reserved_token_{N + 5}|>"), f"name of id {N + 5}"),
    ],
)
def test_bad_names(tmp_path: Path, content: str, message: str) -> None:
    write_small(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer_config.json" in caught.value.message and caught.value.hint


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_missing_and_oversized_files(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(tmp_path)
    monkeypatch.setattr(module, "MAX_RANKS_BYTES", 100_000)
    monkeypatch.setattr(module, "MAX_CONFIG_BYTES", 100_000)
    Tokenizer.load(tmp_path)
    (tmp_path / name).write_bytes(b" " * 100_001)
    with pytest.raises(TokenizerError, match=f"{name}: is larger than"):
        Tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(TokenizerError, match=f"{name}: cannot be read"):
        Tokenizer.load(tmp_path)
