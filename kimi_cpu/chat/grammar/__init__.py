"""Structured output and strict tool calls: what a reply may say, token by token.

`constrain` makes a `Constraint` from a request's tools, tool_choice, parallel_tool_calls and
response_format. Free text stays free; what is JSON always parses and validates, and sections,
headers and control tokens are as Kimi's format wants them (the table in `constraint.py`). Use:

    prompt_ids = encode_segments(...)
    constraint = constrain(                 # None: nothing is constrained
        tokenizer, tools=conversation.tools, tool_choice=..., response_format=...,
        in_reasoning=starts_in_reasoning(tokenizer, prompt_ids),
        next_call_index=conversation.next_call_index, eos_token_ids=config.eos_token_ids,
    )                                       # GrammarError: a 400 that names error.param
    reply = Reply(..., allow_tools=..., constraint=constraint)

`Reply.feed` raises DeadEndError, before it chose a token, where a reply can go on no further within
its schema and the limits: `reply.finish("length")` ends it, as max_tokens would.

`mask` and `accept` depend on nothing but the tokens accepted so far. Needs the extra `[server]`.
"""

from kimi_cpu.chat.grammar.constraint import Constraint, DeadEndError, constrain
from kimi_cpu.chat.grammar.schema import GrammarError

__all__ = ["Constraint", "DeadEndError", "GrammarError", "constrain"]
