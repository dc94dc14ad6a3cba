"""A conversation in OpenAI's form -> the token ids to reply to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kimi_cpu.chat.messages import Conversation, normalise
from kimi_cpu.errors import ContextError
from kimi_cpu.server.replay import Replies
from kimi_cpu.server.settings import ServedModel


@dataclass(frozen=True)
class ChatPrompt:
    """ids: the tokens up to the reply. conversation: what they say, normalised.
    key: names the conversation, see `Replies.remember`.
    """

    ids: list[int]
    conversation: Conversation
    key: bytes


def chat_prompt(
    model: ServedModel,
    replies: Replies,
    messages: Any,
    tools: Any = None,
    *,
    thinking: bool | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> ChatPrompt:
    """Render a conversation, with the model's own turns in the tokens that it sampled.

    Takes time in proportion to the conversation: call it in a thread. Raises MessageError,
    TemplateError, and ContextError when there is no room left for a reply.
    """
    recalled = replies.recall(normalise(messages, tools or None))
    conversation = recalled.conversation
    segments = model.template.render_segments(
        conversation.messages,
        conversation.tools,
        thinking=thinking,
        **(template_kwargs or {}),
    )
    ids = replies.encode(segments, recalled)
    check_length(model, ids, "messages")
    return ChatPrompt(ids, conversation, recalled.key)


def check_length(model: ServedModel, ids: list[int], field: str) -> None:
    """Raise ContextError unless the prompt leaves room for a token."""
    if len(ids) >= model.context:
        raise ContextError(
            f"{field}: the prompt has {len(ids):,} tokens, the model's context is "
            f"{model.context:,}",
            "Shorten it or start a new conversation.",
        )
