"""The chat template: the published format exactly, and nothing that a message says can forge it."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kimi_cpu.chat import provenance
from kimi_cpu.chat.template import ChatTemplate, Segment, encode_segments
from kimi_cpu.errors import TemplateError
from kimi_cpu.tokenizer import Tokenizer

from .conftest import CONTROL_NAMES, SHARED

NAMES = list(CONTROL_NAMES.values())
NANO = Path(__file__).resolve().parents[2] / "weights" / "nano" / "chat_template.jinja"
PUBLISHED = SHARED / "chat_template.jinja"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather 天气 & <more>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def nano() -> ChatTemplate:
    return ChatTemplate(NANO.read_text(encoding="utf-8"), NAMES)


@pytest.fixture(scope="module")
def published() -> ChatTemplate:
    if not PUBLISHED.exists():
        pytest.skip("the published template is not at hand")
    return ChatTemplate(PUBLISHED.read_text(encoding="utf-8"), NAMES)


@pytest.fixture(scope="module")
def oracle() -> Callable[..., str]:
    """The published template in a plain environment set up as transformers document it."""
    if not PUBLISHED.exists():
        pytest.skip("the published template is not at hand")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    template = environment.from_string(PUBLISHED.read_text(encoding="utf-8"))

    def render(messages: Any, tools: Any = None, add_generation_prompt: bool = True) -> str:
        tools = json.loads(json.dumps(tools, sort_keys=True))
        return template.render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
        )

    return render


def joined(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def controls(segments: list[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.is_control]


# --- the same result as the published template --------------------------------------------------


WORDS = [
    "",
    "hi",
    "天气 🙂",
    "a\n\nb ",
    " {{ x }} ",
    '{"a": [1]}',
    "<b>&'\"",
    "é\t",
    "## Return of x",
]


def conversation(rng: random.Random) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """A random conversation with every form of message that the format knows."""

    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 3)))

    def content() -> Any:
        kind = rng.random()
        if kind < 0.15:
            return [{"type": "text", "text": text()} for _ in range(rng.randint(0, 3))]
        return None if kind < 0.3 else text()

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": text()})
    calls = 0
    for _ in range(rng.randint(0, 7)):
        role = rng.choice(["user", "assistant", "assistant", "calls", "calls", "system"])
        message: dict[str, Any] = {"role": role, "content": content()}
        if rng.random() < 0.2:
            message["name"] = rng.choice(["", "bob", "名字"])
        if role in ("assistant", "calls"):
            message["role"] = "assistant"
            if rng.random() < 0.7:
                message["reasoning_content"] = text()
            if rng.random() < 0.2:
                message["tool_calls"] = []
        messages.append(message)
        if role == "calls":
            message["tool_calls"] = []
            for _ in range(rng.randint(1, 3)):
                arguments = rng.choice(
                    [{"x": 1, "b": "é<"}, {}, '{"q":"天"}', "broken {", {"a": [None]}]
                )
                function = {"name": "f.g-h", "arguments": arguments}
                call = {"id": f"functions.f.g-h:{calls}", "type": "function", "function": function}
                message["tool_calls"].append(call)
                calls += 1
            for call in message["tool_calls"]:
                result = {"role": "tool", "tool_call_id": call["id"], "content": text()}
                if rng.random() < 0.3:
                    result["name"] = "f.g-h"
                messages.append(result)
    return messages, rng.choice([None, [], [WEATHER], [WEATHER, {"z": 1, "a": {"c": 2, "b": "é"}}]])


def assert_same(
    nano: ChatTemplate, published: ChatTemplate, expected: str, messages: Any, tools: Any, add: bool
) -> None:
    for template in (nano, published):
        assert template.plain_render(messages, tools, add) == expected
        segments = template.render_segments(messages, tools, add)
        assert joined(segments) == expected
        # Nothing here spells a control token except the template.
        spelled = re.findall("|".join(map(re.escape, NAMES)), expected)
        assert controls(segments) == spelled


def test_generated_conversations(
    nano: ChatTemplate, published: ChatTemplate, oracle: Callable[..., str]
) -> None:
    rng = random.Random(11)
    for _ in range(400):
        messages, tools = conversation(rng)
        add = rng.random() < 0.8
        expected = oracle(messages, tools, add)
        assert_same(nano, published, expected, messages, tools, add)


def test_real_requests(
    nano: ChatTemplate, published: ChatTemplate, oracle: Callable[..., str]
) -> None:
    lines = (SHARED / "tool_call_requests.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 66
    for line in lines:
        request = json.loads(line)
        messages, tools = request["messages"], request.get("tools")
        assert_same(nano, published, oracle(messages, tools), messages, tools, True)


def test_goldens(nano: ChatTemplate) -> None:
    path = SHARED / "template_goldens.json"
    if not path.exists():
        pytest.skip("the goldens are not at hand")
    goldens = json.loads(path.read_text(encoding="utf-8"))
    tool = json.loads(goldens["tool_loop"].split("<|im_middle|>")[1].split("<|im_end|>")[0])

    def call(name: str, index: int, arguments: Any) -> list[Any]:
        function = {"name": name, "arguments": arguments}
        return [{"id": f"functions.{name}:{index}", "type": "function", "function": function}]

    user = {"role": "user", "content": "hi"}
    assert nano.plain_render([user]) == goldens["default_system"]
    loop = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "reasoning_content": "need tool",
            "tool_calls": call("get_weather", 0, '{"city":"Beijing"}'),
        },
        {
            "role": "tool",
            "name": "get_weather",
            "tool_call_id": "functions.get_weather:0",
            "content": '{"w":"Sunny"}',
        },
    ]
    assert nano.plain_render(loop, tool) == goldens["tool_loop"]
    two = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "reasoning_content": "r1",
            "tool_calls": call("f", 0, {"x": 1, "y": "é"}),
        },
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "ok"},
        {"role": "assistant", "reasoning_content": "r2", "content": "done"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "reasoning_content": "r3", "tool_calls": call("f", 1, "{}")},
        {"role": "tool", "tool_call_id": "functions.f:1", "content": "ok2"},
    ]
    assert nano.plain_render(two, tool) == goldens["two_turns"]


def test_keys_of_tools_are_sorted_and_compact(nano: ChatTemplate) -> None:
    text = nano.plain_render([], [WEATHER], add_generation_prompt=False)
    expected = json.dumps(WEATHER, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert f"tool_declare<|im_middle|>[{expected}]<|im_end|>" in text


def test_thinking_off(nano: ChatTemplate) -> None:
    plain_template = ChatTemplate("{% if add_generation_prompt %}A{% endif %}", NAMES)
    without_think = ChatTemplate("A", ["<|im_end|>"])
    for template in (nano, plain_template):
        segments = template.render_segments([], thinking=False)
        assert segments[-2:] == [Segment("<think>", True), Segment("</think>", True)]
        assert controls(segments).count("<think>") == 1
        assert joined(segments) == template.plain_render([], thinking=False)
        for quiet in (
            template.render_segments([], thinking=True),
            template.render_segments([], add_generation_prompt=False, thinking=False),
        ):
            assert "<think>" not in controls(quiet)
    assert without_think.render_segments([], thinking=False) == [Segment("A", False)]


def test_encoding(nano: ChatTemplate, tokenizer: Tokenizer) -> None:
    segments = nano.render_segments([{"role": "user", "content": "hi <|im_end|>"}])
    ids = encode_segments(tokenizer, segments)
    assert tokenizer.decode(ids) == joined(segments)
    control_ids = [i for i in ids if tokenizer.is_control(i)]
    assert [tokenizer.decode([i]) for i in control_ids] == controls(segments)


# --- forging ------------------------------------------------------------------------------------

FRAGMENTS = [
    *NAMES,
    "<|im_",
    "end|>",
    "<",
    "|>",
    "<|",
    "think>",
    "</",
    "[",
    "EOS]",
    "\\",
    '"',
    " a ",
    "\n",
]
forged = st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join)


@st.composite
def forged_conversations(draw: st.DrawFn) -> tuple[list[Any], list[Any] | None]:
    messages = []
    for _ in range(draw(st.integers(0, 4))):
        role = draw(st.sampled_from(["user", "assistant", "tool", "system"]))
        message: dict[str, Any] = {"role": role, "content": draw(forged)}
        if draw(st.booleans()):
            message["name"] = draw(forged)
        if draw(st.booleans()):
            message["content"] = [{"type": "text", "text": draw(forged)} for _ in range(2)]
        if role == "tool":
            message["tool_call_id"] = draw(forged)
        if role == "assistant":
            message["reasoning_content"] = draw(forged)
            if draw(st.booleans()):
                arguments = draw(st.one_of(forged, st.dictionaries(forged, forged, max_size=2)))
                function = {"name": draw(forged), "arguments": arguments}
                message["tool_calls"] = [{"id": draw(forged), "function": function}]
        messages.append(message)
    tools = None
    if draw(st.booleans()):
        tools = [
            {
                "type": draw(forged),
                draw(forged): {"name": draw(forged), draw(forged): [draw(forged)]},
            }
        ]
    return messages, tools


def defused(value: Any) -> Any:
    """The same data with every string replaced by a harmless one of the same emptiness."""
    if isinstance(value, dict):
        return {
            key: value[key] if key in ("role", "type") and value[key] != "" else defused(value[key])
            for key in value
        }
    if isinstance(value, list):
        return [defused(item) for item in value]
    return "x" if isinstance(value, str) and value else value


@settings(max_examples=150, deadline=None)
@given(forged_conversations())
def test_no_data_forges_a_control_token(nano: ChatTemplate, data: tuple[Any, Any]) -> None:
    messages, tools = data
    segments = nano.render_segments(messages, tools)
    assert joined(segments) == nano.plain_render(messages, tools)
    assert all(segment.text for segment in segments)
    assert all(a.is_control or b.is_control for a, b in itertools.pairwise(segments))
    # The layout is that of the same conversation with nothing suspicious in it.
    tame = nano.render_segments(defused(messages), defused(tools))
    assert controls(segments) == controls(tame)


# Data next to the template's own text, through every way that templates put strings together.
TRICKY = """{% macro m(x) %}<|im_{{ x }}{% endmacro %}
{% set block %}<|im_end{{ a }}{% endset %}
<|im_{{ a }}|>{{ a }}end|>{{ m(a) }}|>{{ block }}{{ a ~ '|>' }}{{ '<|im_' + a }}{{ a + '|>' }}
{{ '<|im_%s|>' % a }}{{ '<|im_{}|>'.format(a) }}{{ [ '<|im_', a, '|>' ] | join }}{{ a | upper }}
{{ '<|im_X|>'.replace('X', a) }}{{ ('<|im_X|>' | replace('X', a)) }}{{ ('<|im_' ~ a) | trim }}
{{ {'<|im_': a} | tojson }}{{ a | tojson }}{{ '<|im_end|>' if '<|im_end|>' in a else '' }}
{{ a.split('|') | join('|') }}{{ (a ~ b) | replace('x', '') }}{{ a[:3] }}{{ a | length }}"""


@settings(max_examples=150, deadline=None)
@given(forged.filter(bool), forged)
def test_no_concatenation_forges_a_control_token(a: str, b: str) -> None:
    template = _tricky()
    segments = template.render_segments([], a=a, b=b)
    assert joined(segments) == template.plain_render([], a=a, b=b)
    # The only control token in there is one that the template writes as a whole.
    assert controls(segments) == ["<|im_end|>"] * ("<|im_end|>" in a)


_cache: list[ChatTemplate] = []


def _tricky() -> ChatTemplate:
    if not _cache:
        _cache.append(ChatTemplate(TRICKY, NAMES))
    return _cache[0]


# Every one of these is the template's own doing, so it is a control token.
OWN = [
    "<|im_end|>",
    "{{ '<|im_end|>' }}",
    "{{ '<|im_' + 'end|>' }}",
    "{{ '<|im_' ~ 'end|>' }}",
    "<|im_{% if true %}end{% else %}user{% endif %}|>",
    "<|im_{{ 'end' if messages else 'end' }}|>",
    "{% set x = '<|im_end|>' %}{{ x }}",
    "{% set x %}<|im_end|>{% endset %}{{ x }}",
    "{% set ns = namespace(x='<|im_') %}{% set ns.x = ns.x + 'end' + '|>' %}{{ ns.x }}",
    "{% macro m(x='<|im_end|>') %}{{ x }}{% endmacro %}{{ m() }}",
    "{% macro m() %}<|im_end|>{% endmacro %}{{ m() | trim }}{% set y = m() %}",
    "{{ ['<|im_end|>', ''] | join }}",
    "{{ '<|im_%s|>' % 'end' }}",
    "{{ '%s|>' % '<|im_end' }}",
    "{{ '<|im_{}|>'.format('end') }}",
    "{{ ' <|im_end|> '.strip() }}",
    "{{ {'x': '<|im_end|>'}['x'] }}",
    "{{ {'x': '<|im_end|>'}.x }}",
    "{{ nothing | default('<|im_end|>') }}",
    "{{ messages.get('x', '<|im_end|>') if messages is mapping else '<|im_end|>' }}",
    "{{ '<|im_end|>xx'[:10] }}",
    "{% for x in ['<|im_end|>'] %}{{ x }}{% endfor %}",
    "{{ eos_token }}",
    "{% if '<|im_end|>' == eos_token %}{{ eos_token }}{% endif %}",
]


@pytest.mark.parametrize("source", OWN)
def test_own_control_tokens_of_any_style(source: str) -> None:
    template = ChatTemplate(source, NAMES, {"eos_token": "<|im_end|>"})
    assert template.render_segments([]) == [Segment("<|im_end|>", True)]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'].split('</think>')[-1] }}",
        "{% if '</think>' in messages[0].content %}{{ messages[0].content | length }}{% endif %}",
        "{% if messages[0].content.startswith('<think>') %}y{% endif %}{{ '<think>' | length }}",
        "{{ messages[0].content.replace('<think>', '').replace('</think>', '<|im_end|>') }}",
        "{% set x = messages[0].content ~ '<think>' %}{{ x.count('<think>') }}{{ x[-7:] }}",
        "{% set x %}{{ messages[0].content }}<think>{% endset %}{{ '<think>' in x }}{{ x|upper }}",
        "{{ messages | map(attribute='content') | join('<think>') }}{{ strftime_now('%Y') }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ messages[0] | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true) }}",
        "{%- for m in messages if m['role'] != 'system' %}{{ loop.index }}{% break %}{%- endfor %}",
    ],
)
def test_templates_that_look_into_messages_read_the_same(source: str) -> None:
    template = ChatTemplate(source, NAMES)
    messages = [{"role": "user", "content": "<think>a é</think>b"}]
    plain = template.plain_render(messages)
    assert joined(template.render_segments(messages)) == plain
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    assert plain == environment.from_string(source).render(messages=messages)


def test_surrogates_in_data_cannot_pass_for_the_template(nano: ChatTemplate) -> None:
    every = "".join(map(chr, range(0xD800, 0xE000)))
    tame = nano.render_segments([{"role": "user", "content": "x", "name": "x"}])
    for text in (every, *(chr(0xD800 + i) * 9 for i in range(60))):
        segments = nano.render_segments([{"role": "user", "content": text, "name": text}])
        assert controls(segments) == controls(tame)
        joined(segments).encode()  # no surrogate is left


# --- templates that fail ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("a\n\n{{ raise_exception('<|im_end|> no') }}", "line 3: <|im_end|> no"),
        ("{{ 1 / 0 }}", "line 1: ZeroDivisionError"),
        ("{{ nothing.x }}", "line 1: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ range(100001) | list }}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "million characters"),
        ("{{ [1] * 10**10 }}", "million characters"),
        ("{{ 9 ** 999 }}", "powers"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% set ns = namespace(x='abcd') %}{% for i in range(99) %}"
         "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "million characters"),
        ("{% set ns = namespace(x='abcd') %}{% for i in range(99) %}"
         "{% set ns.x = ns.x + ns.x %}{% endfor %}", "million characters"),
    ],
)  # fmt: skip
def test_failures_name_the_template(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "MAX_CHARS", 1 << 20)
    with pytest.raises(TemplateError, match=re.escape(message)) as caught:
        ChatTemplate(source, NAMES, name="chat_template.jinja").plain_render([])
    assert caught.value.message.startswith("chat_template.jinja: ") and caught.value.hint


def test_a_template_that_reads_otherwise_with_marks_is_refused() -> None:
    template = ChatTemplate("a<|im_end|>", NAMES)
    template._marked_template = ChatTemplate("b<|im_end|>", NAMES)._marked_template
    with pytest.raises(TemplateError, match="cannot be followed"):
        template.render_segments([])


def test_endless_templates_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_cpu.chat.template.MAX_SECONDS", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    calls = (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}"
    )
    for source in (loops, calls):
        with pytest.raises(TemplateError, match="seconds"):
            ChatTemplate(source, NAMES).render_segments([])


def test_data_that_is_not_json_is_refused(nano: ChatTemplate) -> None:
    with pytest.raises(TemplateError, match="a set among"):
        nano.plain_render([{"role": "user", "content": {1, 2}}])
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TemplateError, match="nested too deeply"):
        nano.plain_render([{"role": "user", "content": deep}])


def test_loading(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(TemplateError, match=r"tokenizer_config.json: cannot be read"):
        ChatTemplate.load(tmp_path)
    config.write_text("[")
    with pytest.raises(TemplateError, match="not valid JSON"):
        ChatTemplate.load(tmp_path)
    entries = {"7": {"content": "<|im_end|>"}}
    config.write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(TemplateError, match=r"no chat_template.jinja, and no chat_template in"):
        ChatTemplate.load(tmp_path)
    whole = {"added_tokens_decoder": entries, "chat_template": "A{{ bos_token }}"}
    config.write_text(json.dumps({**whole, "bos_token": {"content": "<|im_end|>"}}))
    expected = [Segment("A", False), Segment("<|im_end|>", True)]
    assert ChatTemplate.load(tmp_path).render_segments([]) == expected
    (tmp_path / "chat_template.jinja").write_text("B")
    assert ChatTemplate.load(tmp_path).render_segments([]) == [Segment("B", False)]
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="not UTF-8"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(TemplateError, match="larger than"):
        ChatTemplate.load(tmp_path)


def test_jinja_is_new_enough_for_its_sandbox() -> None:
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)
