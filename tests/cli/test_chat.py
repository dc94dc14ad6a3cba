"""`kimi-cpu chat`: piped, and with a person at a pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import sys
import time

import pytest

from kimi_cpu.cli.conversations import Conversation, ConversationStore
from kimi_cpu.cli.prompting import Interrupt
from kimi_cpu.errors import UsageError, UserError
from tests.cli.conftest import FAKE, ROOT

pexpect = pytest.importorskip("pexpect")
unix = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])")


def saved(home) -> dict:
    (path,) = (home / "conversations").glob("*.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return json.loads(path.read_text())


# Piped


def test_piped_lines_are_messages(process, home):
    done = process("chat", "--temp", "0", input="one\n\ncount\n")
    assert done.returncode == 0
    assert done.stdout == "You said **one**.\nThere are 2 user turns.\n"
    value = saved(home)
    assert [m["role"] for m in value["messages"]] == ["user", "assistant"] * 2
    assert value["messages"][1]["reasoning_content"] == "Let me think."


def test_undo_retry_and_unknown_commands(process, home):
    lines = ["one", "two", "/undo", "count", "/retry", "/undo", "/undo", "/undo", "/udno"]
    done = process("chat", "--temp", "0", "--seed", "1", input="\n".join(lines))
    assert done.stdout.splitlines()[2:] == ["There are 2 user turns."] * 2
    assert "Taken back: two" in done.stderr and "there is nothing to take back" in done.stderr
    assert "there is no command /udno\nhint: Did you mean /undo?" in done.stderr
    assert saved(home)["messages"] == []


def test_system_think_and_literal_slashes(process):
    lines = [
        "/system Be brief.",
        "system?",
        "/system default",
        "system?",
        "//x",
        "/tmp/x is a path",
    ]
    done = process("chat", "--temp", "0", "--tools", "none", input="\n".join(lines))
    out = done.stdout.splitlines()
    assert out[:2] == ["System: Be brief.", "System: none"]
    assert out[2:] == ["You said **/x**.", "You said **/tmp/x is a path**."]


def test_think_off_and_budget(process, home):
    process("chat", "--temp", "0", input="/think off\na\n/think 3\nb\n/think on\nc\n/think maybe\n")
    messages = saved(home)["messages"]
    assert [m.get("reasoning_content") for m in messages[1::2]] == [None, "Let", "Let me think."]


def test_builtin_tools_run_and_are_shown(process, home):
    done = process("chat", "--temp", "0", input="calc 17 * 23\ncalc 1/0\n")
    assert done.stdout.splitlines() == [
        "The tool says 391.",
        "The tool says error: division by zero.",
    ]
    assert "calculator(17 * 23) → 391\n" in done.stderr
    messages = saved(home)["messages"]
    assert [m["role"] for m in messages[:4]] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_call_id"] == "functions.calculator:0"


def test_other_tools_ask_for_a_result(process, home, tmp_path):
    path = tmp_path / "t.json"
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
    path.write_text(json.dumps([{"type": "function", "function": function}]))
    lines = "weather\nsunny\nweather\n"
    done = process("chat", "--temp", "0", "--tools", str(path), input=lines)
    assert "The model calls get_weather(Paris)" in done.stderr
    assert done.stdout.splitlines()[:2] == ["Looking.", "The tool says sunny."]
    assert saved(home)["messages"][-2]["content"] == "", "the end of input is an empty result"


def test_a_declared_calculator_replaces_the_built_in_one(process, tmp_path):
    path = tmp_path / "tools.json"
    function = {"name": "calculator", "parameters": {"type": "object"}}
    path.write_text(json.dumps([{"type": "function", "function": function}]))
    done = process("chat", "--temp", "0", "--tools", str(path), input="calc 2*3\nseven\n")
    assert "The model calls calculator(2*3)" in done.stderr
    assert done.stdout == "The tool says seven.\n"


def test_rounds_of_tool_calls_are_bounded(process, home):
    (home / "conversations").mkdir(parents=True)
    done = process("chat", "--temp", "0", "--no-save", input="calc 'again'\n", FAKE_LOOP="1")
    assert done.returncode == 0
    assert "Stopped after 8 rounds of tool calls." in done.stderr
    assert not list((home / "conversations").iterdir()), "--no-save keeps nothing"


def test_continue_save_load_sessions(process, home):
    process("chat", "--temp", "0", input="first topic\n/save mine\n")
    process("chat", "--temp", "0", input="second topic\n")
    listed = process("chat", input="/sessions\n").stderr
    assert listed.index("second topic") < listed.index("first topic") and "mine" in listed
    done = process("chat", "--temp", "0", "--continue", input="count\n/load mine\ncount\n")
    assert done.stdout == "There are 2 user turns.\n" * 2
    assert "Resumed mine: first topic" in done.stderr
    done = process("chat", input="/load 1\n/load nope\n/load ../x\n/save\n")
    assert "Resumed mine" in done.stderr, "the one changed last is number 1"
    assert "there is no conversation 'nope'" in done.stderr
    assert "'../x' is not a name" in done.stderr
    assert "exists" in process("chat", "--temp", "0", input="x\n/save mine\n").stderr


def test_continue_without_conversations(process):
    done = process("chat", "--continue", input="")
    assert done.returncode == 0 and "There is no conversation to continue" in done.stderr


def test_context_full_takes_the_message_back(process, home):
    done = process("chat", "--temp", "0", input="x" * 5000 + "\ncount\n")
    assert "error: the prompt does not fit" in done.stderr
    assert done.stdout == "There are 1 user turns.\n"


def test_stats_and_help(process):
    err = process("chat", "--temp", "0", input="a\nb\n/stats\n/help\n/exit\nnever\n").stderr
    assert re.search(r"replies +2, \d+ tokens", err) and re.search(r"[1-9]\d* of them reused", err)
    assert "/sessions" in err and "/quit" not in err and "experts" not in err
    err = process("chat", "--memory", "2G", input="a\n/stats\n").stderr
    assert "75% of experts in memory" in err
    assert re.search(r"experts +7 in memory, 75% of uses there, .* \(direct\)", err)


# Files


def test_damaged_conversations_are_errors_and_stay(home, kimi):
    store = ConversationStore()
    store.folder.mkdir(parents=True)
    path = store.path("bad")
    good = {"format": 1, "messages": []}
    for text in (
        "{", "[]", "{}", json.dumps(good | {"messages": [{"role": "x"}]}),
        json.dumps(good | {"system": 3}), json.dumps(good | {"format": 9}),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            store.load("bad")
        assert path.read_text() == text
    code, _, err = kimi("chat", "--continue")
    assert code == 1 and "damaged" in err and str(path) in err


def test_names_and_new_files(home):
    store = ConversationStore()
    first, second = Conversation(messages=[{"role": "user", "content": "a"}]), Conversation()
    store.save(first)
    store.save(second)
    assert first.name != second.name and store.newest().name == second.name
    assert store.load(first.name).messages == first.messages
    for name in ("", ".", "a/b", "..", "-x", "a" * 65, "a\n"):
        with pytest.raises(UsageError):
            store.path(name)
    assert not list(store.folder.glob(".saving*"))


def test_a_disk_that_fills_up_leaves_what_was_there(home, monkeypatch):
    store, conversation = ConversationStore(), Conversation(system="first")
    path = store.save(conversation)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    conversation.system = "second"
    with pytest.raises(UserError, match="No space left"):
        store.save(conversation)
    assert store.load(conversation.name).system == "first"
    assert list(store.folder.iterdir()) == [path], "no temporary file stays"


def test_interrupt_gives_the_signal_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").write_text("")
    store = ConversationStore(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="cannot be saved"):
        store.save(Conversation())


# At a terminal


class Person:
    """Types at `kimi-cpu chat` in a pseudo-terminal and reads what is on the screen."""

    def __init__(self, folder, *args: str, **env: str) -> None:
        self.child = pexpect.spawn(
            FAKE[0],
            [*FAKE[1:], "chat", "--temp", "0", *args],
            cwd=str(ROOT),
            env=os.environ | {"KIMI_CPU_MODEL": str(folder)} | env,
            encoding="utf-8",
            timeout=20,
            dimensions=(24, 80),
        )
        self.seen, self.read = "", 0

    def wait(self, text: str) -> str:
        """What appears until text (a regular expression) does, styles aside, text included."""
        end = time.time() + 20
        while not (found := re.search(text, self._unread())):
            assert time.time() < end, f"no {text!r} in {self._unread()!r}"
            try:
                self.seen += self.child.read_nonblocking(10000, 0.2)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                found = re.search(text, self._unread())
                assert found, f"left without {text!r}: {self._unread()!r}"
                break
        screen = self._unread()[: found.end()]
        self.read += len(screen)
        return screen

    def _unread(self) -> str:
        return ESCAPES.sub("", self.seen)[self.read :]

    def type(self, text: str) -> None:
        self.child.send(text)

    def say(self, text: str) -> None:
        self.type(text + "\r")

    def left(self) -> int:
        with contextlib.suppress(pexpect.EOF):
            self.seen += self.child.read()
        self.child.close()
        return self.child.exitstatus if self.child.exitstatus is not None else -1


@pytest.fixture
def person(folder):
    people: list[Person] = []

    def begin(*args: str, **env: str) -> Person:
        people.append(Person(folder, *args, **env))
        people[-1].wait(">>>")
        return people[-1]

    yield begin
    for one in people:
        one.child.close(force=True)


@unix
def test_a_reply_and_ctrl_d(person, home):
    one = person()
    one.say("hello")
    screen = one.wait(r"first token")
    assert "Let me think." in screen and "You said hello." in screen and "**" not in screen
    assert "\x1b[2m" in one.seen and "\x1b[1m" in one.seen
    one.wait(">>>")
    one.type("\x04")
    assert one.left() == 0
    assert "--continue" in one.seen and len(saved(home)["messages"]) == 2


@unix
def test_no_color_writes_no_styles(person):
    one = person(NO_COLOR="1")
    one.say("hello")
    assert "You said **hello**." in one.wait("first token")
    assert "\x1b[2m" not in one.seen and "\x1b[1m" not in one.seen


@unix
def test_ctrl_c_stops_a_reply_and_keeps_the_conversation(person, home):
    one = person()
    one.say("slow please")
    one.wait("word word")
    one.type("\x03")
    one.wait("stopped")
    one.wait(">>>")
    one.say("count")
    one.wait("There are 2 user turns")
    one.wait(">>>")
    one.type("\x04")
    assert one.left() == 0
    partial = saved(home)["messages"][1]
    assert partial["content"].startswith("word word") and len(partial["content"]) < 900


@unix
def test_ctrl_c_at_the_prompt_clears_the_line(person):
    one = person()
    one.type("garbage")
    one.wait("garbage")
    one.type("\x03")
    one.wait(">>>")
    one.type("\x03")
    one.wait("leaves")
    one.say("hi")
    assert "You said hi." in one.wait("first token")


@unix
def test_undo_retry_and_suggestion(person):
    one = person()
    one.say("hello")
    one.wait("first token")
    one.say("/retyr")
    one.wait("Did you mean /retry?")
    one.say("/retry")
    one.wait(r"this once it is 0\.7")
    one.wait("first token")
    one.say("/undo")
    one.wait("Taken back: hello")
    one.say("count")
    one.wait("There are 1 user turns")


@unix
def test_a_pasted_text_is_one_message(person):
    one = person()
    one.type("\x1b[200~first line\nsecond line\x1b[201~")
    one.wait("second line")
    one.type("\r")
    one.wait("first token")
    one.say("count")
    one.wait("There are 2 user turns")


@unix
def test_continue_shows_where_we_were(person, home):
    one = person()
    one.say("hello")
    one.wait("first token")
    one.say("/exit")
    assert one.left() == 0
    two = person("--continue")
    two.wait(r"You said \*\*hello\*\*")
    two.wait(">>>")
    two.say("count")
    two.wait("There are 2 user turns")
    assert (home / "history").read_text().count("+hello") == 1
    assert stat.S_IMODE((home / "history").stat().st_mode) == 0o600


@unix
def test_model_output_cannot_control_the_terminal(person):
    one = person()
    one.say("escape")
    assert "␛]0;title␇" in one.wait("first token")
