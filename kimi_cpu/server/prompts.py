"""A conversation in OpenAI's form -> the token ids to reply to, and the reply to them.

Both take time in proportion to the conversation and its tools: call them in a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kimi_cpu.chat.generate import Reply, continued
from kimi_cpu.chat.grammar import constrain
from kimi_cpu.chat.messages import Conversation, normalise
from kimi_cpu.chat.parser import starts_in_reasoning
from kimi_cpu.errors import ContextError
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.server.replay import Replies
from kimi_cpu.server.settings import ServedModel


@dataclass(frozen=True)
class ChatPrompt:
    """ids: the tokens up to the reply. conversation: what they say, normalised.
    key: names the conversation, see `Replies.remember`.
    begun: the beginning of the reply, which the ids end in.
    """

    ids: list[int]
    conversation: Conversation
    key: bytes
    begun: str = ""


def chat_prompt(
    model: ServedModel,
    replies: Replies,
    messages: Any,
    tools: Any = None,
    *,
    thinking: bool | None = None,
    template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
    begun: str = "",
    check: bool = True,
) -> ChatPrompt:
    """Render a conversation, with the model's own turns in the tokens that it sampled.

    begun: text that the reply begins with; thinking must be off.
    Raises MessageError, TemplateError, and with `check` ContextError when no room is left for a
    reply.
    """
    recalled = replies.recall(normalise(messages, tools))
    conversation = recalled.conversation
    segments = model.template.render_segments(
        conversation.messages,
        conversation.tools,
        add_generation_prompt,
        thinking=thinking,
        **(template_kwargs or {}),
    )
    ids = replies.encode(segments, recalled) + model.tokenizer.encode_text(begun)
    if check:
        check_length(model, ids, "messages")
    return ChatPrompt(ids, conversation, recalled.key, begun)


def chat_reply(
    model: ServedModel,
    prompt: ChatPrompt,
    params: SamplingParams,
    *,
    tool_choice: Any = None,
    parallel_tool_calls: bool = True,
    response_format: Any = None,
    top_logprobs: int | None = None,
    constrained: bool = True,
) -> Reply:
    """The reply to a conversation: calls follow their tools' schemas, content `response_format`.

    tool_choice, response_format: in OpenAI's form. Raises GrammarError naming the field.
    constrained: if not, the model is trusted with the form of its calls.
    """
    tokenizer, conversation = model.tokenizer, prompt.conversation
    eos_token_ids = model.engine.config.eos_token_ids
    constraint = None
    if constrained:
        constraint = constrain(
            tokenizer,
            tools=[_lenient(tool) for tool in conversation.tools or ()],
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            in_reasoning=starts_in_reasoning(tokenizer, continued(tokenizer, prompt.ids, params)),
            next_call_index=conversation.next_call_index,
            eos_token_ids=eos_token_ids,
        )
    return Reply(
        tokenizer,
        prompt.ids,
        params,
        allow_tools=bool(conversation.tools) and tool_choice != "none",
        max_calls=None if parallel_tool_calls else 1,
        next_call_index=conversation.next_call_index,
        eos_token_ids=eos_token_ids,
        constraint=constraint,
        top_logprobs=top_logprobs,
    )


def _lenient(tool: dict[str, Any]) -> dict[str, Any]:
    """Keywords that cannot be enforced are errors only where the client says `strict`: agents
    declare all kinds of schemas."""
    function = tool["function"]
    return {**tool, "function": {**function, "strict": function.get("strict") is True}}


def check_length(model: ServedModel, ids: list[int], field: str) -> None:
    """Raise ContextError unless the prompt leaves room for a token."""
    if len(ids) >= model.context:
        raise ContextError(
            f"{field}: the prompt has {len(ids):,} tokens, the model's context is "
            f"{model.context:,}",
            "Shorten it or start a new conversation.",
        )
