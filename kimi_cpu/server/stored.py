"""Responses that later requests go on from, by their id."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

#: Bounds the memory. A response counts with all of its conversation.
MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """messages: the conversation with the response, in the form of chat completions.
    body: the response as it was sent.
    """

    messages: tuple[dict[str, Any], ...]
    body: dict[str, Any]
    n_bytes: int


class StoredResponses:
    """The last responses, in memory only. For the event loop alone."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, Stored] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}  # of their outputs, by id
        self._n_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def keep(self, messages: tuple[dict[str, Any], ...], body: dict[str, Any]) -> None:
        """Keep a response, and drop those that were not used for longest."""
        self.drop(body["id"])
        n_bytes = len(msgspec.json.encode(messages)) + len(msgspec.json.encode(body))
        self._responses[body["id"]] = Stored(messages, body, n_bytes)
        self._items |= {item["id"]: item for item in body.get("output", ())}
        self._n_bytes += n_bytes
        while len(self._responses) > MAX_RESPONSES or self._n_bytes > self._max_bytes:
            self.drop(next(iter(self._responses)))

    def find(self, response_id: str) -> Stored | None:
        """A response that is still there."""
        if response_id not in self._responses:
            return None
        self._responses.move_to_end(response_id)
        return self._responses[response_id]

    def find_item(self, item_id: str) -> dict[str, Any] | None:
        """A message, a call or the reasoning of a response that is still there."""
        return self._items.get(item_id)

    def drop(self, response_id: str) -> bool:
        """Forget a response; False if it is not there."""
        gone = self._responses.pop(response_id, None)
        if gone is None:
            return False
        self._n_bytes -= gone.n_bytes
        for item in gone.body.get("output", ()):
            self._items.pop(item["id"], None)
        return True
