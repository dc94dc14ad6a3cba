"""How long the model may reason: one number of tokens from the many ways to say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kimi_cpu.server.errors import ApiError

#: OpenAI's efforts as tokens of reasoning; None is without a bound.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 8192,
    "high": None,
    "xhigh": None,
    "max": None,
}


def budget_of_effort(effort: str, param: str = "reasoning_effort") -> int | None:
    """The tokens of an effort; ApiError for a word that is none."""
    if effort not in EFFORTS:
        raise ApiError(400, f"{param} is {effort[:40]!r}: use {', '.join(EFFORTS)}", param=param)
    return EFFORTS[effort]


def budget_of_thinking(thinking: bool | Mapping[str, Any], param: str = "thinking") -> int | None:
    """The tokens of `true`, `false`, or `{"type": "enabled" | "disabled", "budget_tokens": N}`."""
    if isinstance(thinking, bool):
        return None if thinking else 0
    kind = thinking.get("type", "enabled")
    if kind not in ("enabled", "disabled", "adaptive", "auto"):
        raise ApiError(400, f"{param}.type: use enabled or disabled", param=f"{param}.type")
    if kind == "disabled":
        return 0
    return _tokens(thinking.get("budget_tokens"), f"{param}.budget_tokens")


def split_template_kwargs(
    given: Mapping[str, Any] | None,
) -> tuple[int | None, bool, dict[str, Any]]:
    """`chat_template_kwargs` -> (budget, whether it says anything of thinking, other variables).

    `thinking` and `enable_thinking` switch it, `thinking_budget` bounds it.
    """
    where = "chat_template_kwargs"
    others: dict[str, Any] = {}
    budget: int | None = None
    says = False
    for name, value in (given or {}).items():
        if name in ("thinking", "enable_thinking"):
            if not isinstance(value, bool):
                raise ApiError(400, f"{where}.{name}: not a boolean", param=f"{where}.{name}")
            says = True
            if not value:
                budget = 0
        elif name == "thinking_budget":
            says = True
            bound = _tokens(value, f"{where}.{name}")
            budget = bound if budget is None else budget
        else:
            others[name] = value
    return budget, says, others


def _tokens(value: Any, param: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ApiError(400, f"{param}: not a number of tokens", param=param)
    return value
