"""Conversations on disk: one JSON file each, private to the user, written whole or not at all."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_cpu.errors import UsageError, UserError

FORMAT = 1
MAX_BYTES = 256 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def data_folder() -> Path:
    """Where the user's data is kept: KIMI_CPU_HOME, or the platform's place for it."""
    if home := os.environ.get("KIMI_CPU_HOME"):
        return Path(home).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "kimi-cpu"


def _now() -> str:
    return dt.datetime.now().astimezone().isoformat(timespec="seconds")


@dataclass
class Conversation:
    """Messages in OpenAI form without the system message, which is `system`."""

    name: str = ""  # empty until it is first saved
    model: str = ""
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    created: str = field(default_factory=_now)
    updated: str = ""

    @property
    def title(self) -> str:
        """The first thing the user said, in one short line."""
        for message in self.messages:
            if message.get("role") == "user":
                text = " ".join(str(message.get("content")).split())
                return text if len(text) <= 60 else text[:59] + "…"
        return "(empty)"

    @property
    def turns(self) -> int:
        return sum(message.get("role") == "user" for message in self.messages)

    def undo(self) -> str | None:
        """Take back the last user message and all after it; its text, None if there is none."""
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at].get("role") == "user":
                text = str(self.messages[at].get("content"))
                del self.messages[at:]
                return text
        return None


class ConversationStore:
    """The files of one folder; `folder` is made when the first conversation is saved."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or data_folder() / "conversations"

    def path(self, name: str) -> Path:
        """The file of a name. UsageError when it is not a plain file name."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is not a name for a conversation",
                "Use up to 64 letters, digits, dots, dashes and underscores.",
            )
        return self.folder / f"{name}.json"

    def save(self, conversation: Conversation) -> Path:
        """Write it, giving it a name first if it has none. UserError when that fails."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not conversation.name:
                conversation.name = self._new_name()
            path = self.path(conversation.name)
            conversation.updated = _now()
            value = {
                "format": FORMAT,
                "model": conversation.model,
                "created": conversation.created,
                "updated": conversation.updated,
                "system": conversation.system,
                "messages": conversation.messages,
            }
            _write(path, json.dumps(value, ensure_ascii=True, indent=1))
        except OSError as error:
            raise UserError(
                f"the conversation cannot be saved in {self.folder} ({error.strerror or error})",
                "Free some space, or set KIMI_CPU_HOME to a folder that can be written.",
            ) from None
        return path

    def load(self, name: str) -> Conversation:
        """Read one by its name or an unambiguous beginning of it.

        Raises UsageError when there is none, UserError when the file is damaged; it is kept.
        """
        path = self.path(name)
        if not path.is_file():
            found = [other for other in self.names() if other.startswith(name)]
            if len(found) != 1:
                raise UsageError(
                    f"{len(found)} conversations begin with {name!r}"
                    if found
                    else f"there is no conversation {name!r}",
                    "/sessions lists them.",
                )
            path = self.path(found[0])
        return _read(path)

    def names(self) -> list[str]:
        """All names, the newest first."""
        try:
            found = []
            for path in self.folder.glob("*.json"):
                stat = path.stat()
                # an empty file is a name that was claimed and never saved to
                if _NAME.fullmatch(path.stem) and stat.st_size:
                    found.append((stat.st_mtime_ns, path.stem))
        except OSError:
            return []
        return [name for _, name in sorted(found, reverse=True)]

    def newest(self) -> Conversation | None:
        """The conversation saved last. UserError when its file is damaged."""
        names = self.names()
        return self.load(names[0]) if names else None

    def _new_name(self) -> str:
        base = dt.datetime.now().strftime("%Y%m%d-%H%M%S")
        for number in range(1, 1000):
            name = base if number == 1 else f"{base}-{number}"
            try:  # claims the name, so that two chats begun at once stay apart
                os.close(os.open(self.path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                continue
            return name
        raise OSError("no free name")


def _write(path: Path, text: str) -> None:
    """Replace a file in one step; mode 0600 from the start."""
    handle, temporary = tempfile.mkstemp(prefix=".saving-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> Conversation:
    def damaged(why: str) -> UserError:
        return UserError(
            f"{path}: the conversation is damaged ({why})",
            "The file is kept as it is: repair it or move it away.",
        )

    try:
        if path.stat().st_size > MAX_BYTES:
            raise damaged(f"larger than {MAX_BYTES >> 20} MB")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise damaged(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise damaged("not an object")
    if value.get("format") != FORMAT:
        raise damaged(f"format {value.get('format')!r}, this program reads {FORMAT}")
    strings = {name: value.get(name, "") for name in ("model", "system", "created", "updated")}
    messages = value.get("messages")
    if not all(isinstance(text, str) for text in strings.values()):
        raise damaged("a field that should be text is not")
    from kimi_cpu.chat.messages import normalise

    try:
        normalise(messages)
    except UserError as error:
        raise damaged(error.message) from None
    assert isinstance(messages, list)
    return Conversation(name=path.stem, messages=messages, **strings)
