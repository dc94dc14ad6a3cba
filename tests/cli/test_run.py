"""`kimi-cpu run`, errors and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from kimi_cpu.cli import common
from kimi_cpu.cli.main import VERBS, main
from kimi_cpu.errors import CheckpointError
from tests.cli.conftest import FAKE, ROOT

TOOLS = [
    {
        "type": "function",
        "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture
def tools_file(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    return str(path)


def test_stdout_is_the_answer_and_stderr_the_rest(kimi):
    code, out, err = kimi("run", "--temp", "0", "hello", "there")
    assert (code, out) == (0, "You said **hello there**.\n")
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tok/s · first token [\d.]+ s\n", err)


def test_json(kimi):
    code, out, _ = kimi("run", "--temp", "0", "--json", "hé")
    value = json.loads(out)
    assert code == 0 and value["text"] == "You said **hé**."
    assert value["reasoning"] == "Let me think." and value["finish_reason"] == "stop"
    assert value["tool_calls"] == [] and value["usage"]["reasoning_tokens"] == 13
    assert set(value["timings"]) == {"prompt_s", "first_token_s", "total_s", "decode_tps"}
    assert value["experts"]["hit_rate"] == 0.75 and value["experts"]["read_bytes"] == 1000


def test_a_budget_of_memory(kimi):
    code, out, err = kimi("run", "--temp", "0", "--memory", "2G", "hello")
    assert code == 0 and out == "You said **hello**.\n"
    assert err.rstrip().endswith("75% of experts in memory")
    code, out, err = kimi("run", "--memory", "much", "hello")
    assert code == 2 and out == "" and "'much' is no amount of memory" in err and "16G" in err


def test_tool_calls_are_returned_not_run(kimi, tools_file):
    _, out, _ = kimi("run", "--temp", "0", "--json", "--tools", tools_file, "calc 2*3")
    value = json.loads(out)
    assert value["finish_reason"] == "tool_calls"
    assert value["tool_calls"] == [
        {
            "id": "functions.calculator:0",
            "type": "function",
            "function": {"name": "calculator", "arguments": '{"expression": "2*3"}'},
        }
    ]
    assert kimi("run", "--temp", "0", "--tools", tools_file, "calc 2*3")[1] == "calculator(2*3)\n"


def test_system_and_no_think(kimi):
    assert kimi("run", "--temp", "0", "-s", "Be brief.", "system?")[1] == "System: Be brief.\n"
    value = json.loads(kimi("run", "--temp", "0", "--no-think", "--json", "x")[1])
    assert value["reasoning"] == "" and value["text"] == "You said **x**."
    value = json.loads(kimi("run", "--temp", "0", "--thinking-budget", "3", "--json", "x")[1])
    assert value["reasoning"] == "Let"


def test_max_tokens_says_that_it_cut(kimi):
    code, _, err = kimi("run", "--temp", "0", "-n", "3", "x")
    assert code == 0 and "3 tokens" in err and "cut off" in err


def test_recommended_sampling(folder, kimi):
    path = folder / "generation_config.json"
    try:
        path.write_text('{"do_sample": false, "top_p": 0.9}')
        assert kimi("run", "x")[1] == "You said **x**.\n"
        assert common.sampling_params(folder).temperature == 0
        assert common.sampling_params(folder, temp=0.5).top_p == 1
        path.write_text('{"temperature": 0.3, "top_k": 7}')
        params = common.sampling_params(folder, top_k=3)
        assert (params.temperature, params.top_k) == (0.3, 3)
        for text in ("{", "[]", '{"temperature": "hot"}', '{"top_p": 7}'):
            path.write_text(text)
            with pytest.raises(CheckpointError, match="generation_config"):
                common.sampling_params(folder)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["run"], 2, "there is no prompt"),
        (["run", "--top-p", "2", "x"], 2, "--top-p is 2.0"),
        (["run", "--temp", "hot", "x"], 2, "'hot' is not a valid float"),
        (["run", "--max-tokens", "0", "x"], 2, "--max-tokens is 0"),
        (["run", "--no-think", "--thinking-budget", "5", "x"], 2, "contradict"),
        (["run", "--model", "/no/such", "x"], 2, "--model names no folder: /no/such"),
        (["run", "--model", __file__, "x"], 2, "--model names a file"),
        (["run", "--model", str(ROOT / "tests"), "x"], 2, "a folder without config.json"),
        (["run", "--tools", "/no/such.json", "x"], 2, "/no/such.json: cannot be read"),
        (["run", "--tools", __file__, "x"], 2, "is not valid JSON"),
        (["run", "--tmep", "1", "x"], 2, "No such option"),
        (["rnu", "x"], 2, "there is no command `rnu`"),
        (["what is 2+2"], 2, "there is no command"),
        (["inspect", "/no/such"], 2, "there is no folder /no/such"),
    ],
)
def test_errors_are_two_lines(kimi, args, code, message):
    got, out, err = kimi(*args)
    lines = err.strip().splitlines()
    assert got == code and out == "" and lines[0].startswith("error: ") and message in lines[0]
    assert lines[1].startswith("hint: ") and len(lines) == 2


def test_hints_name_the_options(kimi):
    assert "hint: --temp must be" in kimi("run", "--temp", "-1", "x")[2]
    assert "hint: --top-p must be" in kimi("run", "--top-p", "2", "x")[2]


def test_tools_none_declares_none(kimi):
    assert kimi("run", "--temp", "0", "--tools", "none", "x")[1] == "You said **x**.\n"


def test_a_template_of_another_model(kimi, folder):
    path = folder / "chat_template.jinja"
    source = path.read_text()
    try:
        path.write_text("{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}")
        code, _, err = kimi("run", "x")
    finally:
        path.write_text(source)
    assert code == 1 and "writes none of the tokenizer's control tokens" in err and str(path) in err


def test_threads_are_checked(folder):
    with pytest.raises(Exception, match="--threads is 0"):
        common.load_model(folder, 0, "fast")


def test_unexpected_errors_are_one_line(kimi, monkeypatch):
    def broken(*_, **options):
        raise KeyError("what")

    monkeypatch.setattr(common, "load_model", broken)
    code, _, err = kimi("run", "x")
    assert code == 1 and "unexpected KeyError" in err and "KIMI_CPU_DEBUG=1" in err
    assert "Traceback" not in err
    monkeypatch.setenv("KIMI_CPU_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["run", "x"])


def test_interrupt_is_130(kimi, monkeypatch):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_model", interrupted)
    assert kimi("run", "x")[0] == 130


def test_the_embedded_model_is_announced(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(common, "embedded_model", lambda: tmp_path)
    assert common.model_folder(None) == tmp_path
    err = capsys.readouterr().err
    assert "nano model" in err and len(err.splitlines()) == 1


def test_stdin(process):
    assert process("run", "--temp", "0", input="from a pipe\n").stdout == (
        "You said **from a pipe**.\n"
    )
    both = process("run", "--temp", "0", "--json", "end", input="top\n")
    assert json.loads(both.stdout)["text"] == "You said **top\n\nend**."
    assert process("run", input=" \n").returncode == 2
    windows = process("run", "--temp", "0", input="\ufefftwo\r\nlines\r\n")
    assert windows.stdout == "You said **two\nlines**.\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_is_no_bug(folder, options):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [*FAKE, "run", "--temp", "0", *options, "x"], stdin=subprocess.DEVNULL, stdout=full,
            stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"KIMI_CPU_MODEL": str(folder)},
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: No space left on device\nhint:")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_notices_that_cannot_be_written_stop_nothing(folder):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [*FAKE, "run", "--temp", "0", "x"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=full, text=True, cwd=ROOT, env=os.environ | {"KIMI_CPU_MODEL": str(folder)},
        )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "You said **x**.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(folder, closed):
    command = f"{sys.executable} -m tests.cli.fake run --temp 0 x {closed}"
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"KIMI_CPU_MODEL": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if closed == ">&-" else "You said **x**.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_chat_without_stdin_ends(folder):
    command = f"{sys.executable} -m tests.cli.fake chat --no-save <&-"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"KIMI_CPU_MODEL": str(folder)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--threads", "0"], "error: --threads is 0\nhint: Use 1 to 1,024.\n"),
        (["--threads", "99999"], "error: --threads is 99999\nhint: Use 1 to 1,024.\n"),
        (["--model", "/no\nsuch\x1b[2J"], "error: --model names no folder: /no␊such␛[2J\nhint: "),
    ],
)
def test_wrong_use_is_two_lines(args, error, capsys):
    assert main(["run", "x", *args]) == 2
    err = capsys.readouterr().err
    assert error in err and err.count("\n") == 2 + err.startswith("No --model")


def test_no_more_threads_is_no_bug(kimi, monkeypatch):
    def refused(*args, **kw):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(common, "load_model", refused)
    code, _, err = kimi("run", "x")
    assert code == 1
    assert err == "error: the system starts no more threads\nhint: Use fewer --threads.\n"


def test_a_pipe_that_closes_is_quiet(process, folder):
    child = subprocess.Popen(
        [*FAKE, "run", "--temp", "0", "slow"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"KIMI_CPU_MODEL": str(folder)},
    )  # fmt: skip
    assert child.stdout and child.stderr
    child.stdout.read(4)
    child.stdout.close()
    err = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait(30) == 1 and "Traceback" not in err and "error" not in err


def test_no_arguments_are_a_question_for_help(kimi):
    code, out, err = kimi()
    assert code == 0 and err == "" and kimi("--help")[1] == out
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_verbs(kimi, verb):
    code, out, _ = kimi(verb, "--help")
    assert code == 0 and out.startswith(f"Usage: kimi-cpu {verb}")


def test_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/dump_cli_help.py", "--check"], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_a_run_with_130(folder):
    child = subprocess.Popen(
        [*FAKE, "run", "--temp", "0", "slow"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"KIMI_CPU_MODEL": str(folder)},
    )  # fmt: skip
    assert child.stdout
    child.stdout.read(5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130 and err.strip() == b""
