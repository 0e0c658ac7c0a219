"""OpenAI's list of messages, checked: roles and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from npllama.errors import UsageError, quote
from npllama.text.protocol import check_text

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """Who says what."""

    role: str
    text: str


def checked_messages(messages: object) -> list[Message]:
    """The messages of a list of {"role": ..., "content": ...}, where content is text or a list of text parts.

    Text parts are joined by line ends, as llama.cpp's server does. Raises UsageError, by the number of the message, for
    another role, another kind of content, and for other keys that say something.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError(
            f"messages is of type {type(messages).__name__}; a list is needed, such as "
            '[{"role": "user", "content": "Hello"}].'
        )
    if not messages:
        raise UsageError("messages is empty; at least one is needed, whose role is user.")
    return [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise UsageError(f'{where} is {quote(message)}; {{"role": ..., "content": ...}} is needed.')
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UsageError(f"{where}: role is {quote(role)}; one of {', '.join(ROLES)} is needed (no tools).")
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, "", [], {}):
            raise UsageError(f"{where}: {quote(key)} is not supported; role and content are all that can be said.")
    return Message(role, _text(message.get("content"), f"{where}: content"))


def _text(content: object, where: str) -> str:
    if isinstance(content, (list, tuple)):
        return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise UsageError(f"{where} is {quote(content)}; text, or a list of text parts, is needed.")
    return _unicode(content, where)


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UsageError(f'{where} is {quote(part)}; {{"type": "text", "text": ...}} is needed: only text is read.')
    return _unicode(part["text"], where)


def _unicode(text: str, where: str) -> str:
    try:
        return check_text(text)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
