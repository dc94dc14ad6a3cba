"""Tries programs that are too large for the test environment against the server.

    python -m tools.check_clients --kimi-code BIN/kimi --kimi-cli BIN/kimi --litellm BIN/python \
        --lm-eval BIN/lm_eval

Each is given by its program in a virtual environment of its own, see docs/clients.md; what is not
given is not tried. Nothing leaves this machine: the server is in this process, the model is the
nano model or, for an agent, a script that speaks Kimi's wire format.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from kimi_cpu.server.settings import ServedModel
from tests.cli.fake import call
from tests.server.conftest import load_nano
from tests.server.live import Live
from tests.server.scripted import scripted_model

SECRET = "marzipan"
TIMEOUT_S = 900


def run(command: list[str], folder: Path, **environment: str) -> str:
    """A program's output; AssertionError with all of it if it fails."""
    names = ("PATH", "LANG", "SYSTEMROOT", "OMP_NUM_THREADS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    env = {**kept, "HOME": str(folder), "PYTHONUTF8": "1", "NO_COLOR": "1", **environment}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"exit code {done.returncode}\n{output}"
    return output


def reads_a_file(prompt: str) -> str:
    """A model that reads a file for its user and says what is in it."""
    tool = "ReadFile" if '"name":"ReadFile"' in prompt else "Read"
    task = re.findall(r"Read the file (\S+) ", prompt)
    results = re.findall(r"## Return of (.*?)<\|im_end\|>", prompt, re.S)
    think = "" if prompt.endswith("</think>") else "<think>I look into it.</think>"
    if not task:
        return think + "What shall I read?"
    if not results:
        return think + call(tool, json.dumps({"path": task[-1]}))
    word = re.search(r"the word is (\w+)", results[-1])
    return think + f"The word is {word[1] if word else 'not there'}."


def check_kimi_code(program: str, folder: Path) -> str:
    """kimi-code (npm) reads a file with its own tool, and computes no prompt twice."""
    # Its first line asks env for node, 22.19 or newer: beside it, or on the path.
    path = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])
    environment = {"PATH": path, "KIMI_CODE_HOME": str(folder), "KIMI_CODE_NO_AUTO_UPDATE": "1"}
    version = run([program, "--version"], folder, **environment).split()[-1]
    with serving(lambda: scripted_model(folder / "model", reads_a_file, context=400_000)) as live:
        (folder / "notes.txt").write_text(f"In this file the word is {SECRET}.\n")
        (folder / "config.toml").write_text(
            'default_model = "local"\ntelemetry = false\n'
            f'[providers.local]\ntype = "kimi"\nbase_url = "{live.url}/v1"\napi_key = "none"\n'
            '[models.local]\nprovider = "local"\nmodel = "kimi"\nmax_context_size = 262144\n'
            'capabilities = ["thinking", "tool_use"]\n'
        )
        task = f"Read the file {folder / 'notes.txt'} and tell me the word."
        output = run([program, "-p", task], folder, **environment)
        assert f"The word is {SECRET}" in output, output
        prompts, cached = (
            _metric(live, f"kimi_cpu_{n}_tokens_total") for n in ("prompt", "cached")
        )
        assert cached > 0.45 * prompts, f"{cached} of {prompts} tokens were known\n{output}"
    return version


def check_kimi_cli(program: str, folder: Path) -> str:
    """kimi-cli reads a file with its own tool, as the model tells it to."""
    version = run([program, "--version"], folder).split()[-1]
    with serving(lambda: scripted_model(folder / "model", reads_a_file, context=400_000)) as live:
        (folder / "notes.txt").write_text(f"In this file the word is {SECRET}.\n")
        (folder / "config.toml").write_text(
            'default_model = "local"\ntelemetry = false\n'
            '[models.local]\nprovider = "local"\nmodel = "kimi"\nmax_context_size = 200000\n'
            'capabilities = ["thinking"]\n'
            f'[providers.local]\ntype = "kimi"\nbase_url = "{live.url}/v1"\napi_key = "none"\n'
        )
        task = f"Read the file {folder / 'notes.txt'} and tell me the word."
        output = run(
            [program, "--config-file", "config.toml", "--work-dir", ".", "--thinking", "--print",
             "-p", task],
            folder, KIMI_CLI_NO_AUTO_UPDATE="1",
        )  # fmt: skip
        assert f"The word is {SECRET}" in output, output
        replies = _metric(live, "kimi_cpu_replies_total")
        assert replies >= 2, f"{replies} replies\n{output}"
    return version


LITELLM = """
import importlib.metadata, json, os, sys
import litellm

url = sys.argv[1]
litellm.suppress_debug_info = True
question = [{"role": "user", "content": "What is 318 * 27?"}]
function = {"name": "calculator", "description": "Evaluate an arithmetic expression.",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}},
                           "required": ["expression"]}}
tools = [{"type": "function", "function": function}]
for model, base in (("openai/nano", url + "/v1"), ("anthropic/nano", url)):
    messages = list(question)
    where = {"model": model, "api_base": base, "api_key": "none", "tools": tools}
    for _ in range(3):
        answer = litellm.completion(messages=messages, max_tokens=1000, **where)
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            left, right = json.loads(call.function.arguments)["expression"].split("*")
            messages.append({"role": "tool", "tool_call_id": call.id,
                             "content": str(int(left) * int(right))})
    assert len(messages) == 4 and "8586" in message.content, messages
    text = ""
    sum_ = [{"role": "user", "content": "What is 17 + 25?"}]
    for chunk in litellm.completion(messages=sum_, max_tokens=500, stream=True, **where):
        text += chunk.choices[0].delta.content or ""
    assert text.endswith("42."), text
response = litellm.responses(model="openai/nano", input="What is 17 + 25?", api_base=url + "/v1",
                             api_key="none")
assert "42." in str(response.output[-1].content[0].text), response
print("version", importlib.metadata.version("litellm"))
"""


def check_litellm(program: str, folder: Path) -> str:
    """litellm: a tool loop and a stream over chat completions and messages; responses."""
    (folder / "check.py").write_text(LITELLM)
    with serving(load_nano) as live:
        output = run([program, "check.py", live.url], folder, LITELLM_LOCAL_MODEL_COST_MAP="True")
    return output.split("version ")[-1].split()[0]


TASKS = {
    "sums_choice": """task: sums_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "sums_text": """task: sums_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "sums_perplexity": """task: sums_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[answer]}}"
metric_list: [{metric: word_perplexity}]
""",
}


def check_lm_eval(program: str, folder: Path) -> str:
    """lm-eval on /v1/completions: choices, generation and perplexity; ids and strings as prompts.

    That tokens are counted right shows in that both give the same results.
    """
    cases = [(a, b) for a in (3, 14) for b in (5, 26)]
    with (folder / "sums.jsonl").open("w") as file:
        for n, (a, b) in enumerate(cases):
            choices = [f" {a + b + 3}", f" {a + b}"]
            line = {"question": f"{a} + {b} =", "choices": choices[:: 1 - 2 * (n % 2)]}
            file.write(json.dumps({**line, "answer": (n + 1) % 2}) + "\n")
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    results = []
    with serving(load_nano) as live:
        for tokenized in ("True", "False"):
            arguments = (
                f"model=nano,base_url={live.url}/v1/completions,tokenizer_backend=remote,"
                f"tokenized_requests={tokenized},num_concurrent=2,max_length=2048"
            )
            output = folder / f"out-{tokenized}"
            run(
                [program, "run", "--model", "local-completions", "--model_args", arguments,
                 "--tasks", ",".join(TASKS), "--include_path", str(folder / "tasks"),
                 "--output_path", str(output)],
                folder, HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1",
            )  # fmt: skip
            (found,) = output.rglob("results*.json")
            body = json.loads(found.read_text())
            results.append({
                f"{task} {name}": value
                for task, values in body["results"].items() for name, value in values.items()
                if isinstance(value, float) and "stderr" not in name
            })  # fmt: skip
    assert results[0] == results[1] and len(results[0]) == len(TASKS), results
    print(f"  {results[0]}")
    return str(body["lm_eval_version"])


class serving:
    """A server for the time of a check."""

    def __init__(self, load: Callable[..., ServedModel]) -> None:
        self._load = load

    def __enter__(self) -> Live:
        load = self._load
        self._live = Live(load if load is load_nano else lambda phase: load())
        return self._live.ready()

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def _metric(live: Live, name: str) -> float:
    text = live.client.get("/metrics").text
    return sum(float(m) for m in re.findall(rf"^{name}\S* (\S+)$", text, re.M))


CHECKS = {
    "kimi_code": check_kimi_code, "kimi_cli": check_kimi_cli, "litellm": check_litellm,
    "lm_eval": check_lm_eval,
}  # fmt: skip


def main() -> int:
    """Run the checks that are asked for; the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, check in CHECKS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="PROGRAM", help=check.__doc__)
    programs = {name: program for name, program in vars(parser.parse_args()).items() if program}
    failed = 0
    for name, program in programs.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                version = CHECKS[name](str(Path(program).absolute()), Path(folder).resolve())
                print(f"{name} {version}: passed")
            except (AssertionError, subprocess.SubprocessError) as error:
                failed += 1
                print(f"{name}: failed\n{error}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
