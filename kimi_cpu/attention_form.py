"""In which form a token's attention is computed: a function of the tokens up to it, nothing else.

Multi-head latent attention has two forms (see `model`) that are equal but for rounding. If the
choice depended on what is convenient, on how many tokens a pass has, say, then a token's last bits
would depend on what was cached, how its prompt was cut, and who else is served. So:

- What an assistant writes is absorbed. It is generated token by token, where that form is best,
  and gives the same bits when it is read again as a part of a later prompt.
- Any other message is absorbed in its first tokens and expanded from there on. So a short one never
  pays for expanding all that is cached, and no length costs more than about twice the attention of
  the better form. (To know the length would need the tokens that follow.)
- The first message has nothing cached before it: it is expanded.

A message begins with a control token (`<|im_user|>` ..), which no text can be taken for. Text
without them is one message. What a model adds to such text token by token is absorbed all the same
(`Session.step`) and is therefore not what a prompt with the same tokens gives: a token's *key*
tells the two apart wherever computed tokens are looked up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from kimi_cpu.config import ModelConfig
from kimi_cpu.kernels.common import I64

Bools = npt.NDArray[np.bool_]
#: Token ids with EXPANDED added where attention is expanded.
Keys = npt.NDArray[np.int32]
EXPANDED = 1 << 30

#: Control tokens that begin a message; the first one that of an assistant.
OPENERS = ("<|im_assistant|>", "<|im_user|>", "<|im_system|>")
#: The expansion begins after this part of the tokens whose multiplications would make up for it:
#: its own are up to 1.6 times as fast (bf16), and of messages that are not short most are long.
BEGIN = 1 / 2.7


@dataclass(frozen=True)
class FormRule:
    """The rule for one model.

    Attributes:
        absorbed_tokens: so many tokens of a message after others are absorbed, whoever wrote it.
        openers: ids of the control tokens that begin a message.
        assistant: that of an assistant's, or -1.
    """

    absorbed_tokens: int
    openers: tuple[int, ...] = ()
    assistant: int = -1

    @classmethod
    def of(cls, config: ModelConfig, folder: Path) -> Self:
        """The rule for the model in a checkpoint's folder."""
        ids = {name: i for name, i in _control_ids(folder).items() if 0 <= i < config.vocab_size}
        openers = tuple(ids[name] for name in OPENERS if name in ids)
        return cls(first_expanded(config), openers, ids.get(OPENERS[0], -1))

    def expanded(self, ids: I64) -> Bools:
        """Which tokens of a prompt, int64 [T] from its beginning, are expanded; bool [T]."""
        places = np.arange(len(ids))
        begins = np.maximum.accumulate(np.where(np.isin(ids, self.openers), places, 0))
        far_enough = (begins == 0) | (places - begins >= self.absorbed_tokens)
        expanded: Bools = far_enough & (ids[begins] != self.assistant)
        return expanded

    def keys(self, ids: Sequence[int] | I64) -> Keys:
        """The keys of a prompt's tokens, int32 [T]."""
        ids = np.asarray(ids, dtype=np.int64)
        return (ids + EXPANDED * self.expanded(ids)).astype(np.int32)


def first_expanded(config: ModelConfig) -> int:
    """How many tokens of a message come before the first expanded one (64 for Kimi K2).

    Multiplications per head and cached token: absorbed T (2 R + P); expanded T (N + V + P) and
    once R (N + V) for the expansion. They are equal at 171 tokens for Kimi K2.
    """
    per_head = config.qk_nope_head_dim + config.v_head_dim
    saved = 2 * config.kv_lora_rank - per_head
    if saved <= 0:
        return config.max_position_embeddings  # never
    return math.ceil(BEGIN * config.kv_lora_rank * per_head / saved)


def ids_of(keys: Sequence[int]) -> tuple[int, ...]:
    """The token ids of keys."""
    return tuple(key & ~EXPANDED for key in keys)


def _control_ids(folder: Path) -> dict[str, int]:
    """Ids of control tokens by name; none if the folder does not tell (`tokenizer` says why)."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        entries = config["added_tokens_decoder"].items()
        return {entry["content"]: int(key) for key, entry in entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
