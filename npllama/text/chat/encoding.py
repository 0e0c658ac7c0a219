"""A chat format, a tokenizer and messages -> ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from npllama.errors import UsageError, checked_flag, quote
from npllama.text.chat.formats import BOS, EOS, FORMATS, ChatFormat, Content, Part, Parts, Special
from npllama.text.chat.marks import Escaped, without_marks
from npllama.text.chat.messages import ASSISTANT, SYSTEM, USER, Message, checked_messages
from npllama.text.protocol import Tokenizer


@dataclass(frozen=True)
class ChatPrompt:
    """What a model reads: ids, the ids that end its answer, and what was escaped in the messages."""

    ids: list[int]
    stop_ids: frozenset[int]
    escaped: tuple[Escaped, ...]


def chat_prompt(name: str, tokenizer: Tokenizer, messages: object, escape: bool = False) -> ChatPrompt:
    """The ids of a dialog, up to where the assistant is to speak, in the chat format of a name.

    messages: OpenAI's list (messages.py), which ends with what the user says. Their texts are encoded as text: none
    becomes a control token. One that holds a mark of the format (marks.py) is refused, or escaped if `escape`. Raises
    UsageError for that, for roles in an order that the format does not have, for a character that the vocabulary cannot
    spell, and for a format whose control tokens the tokenizer does not have.
    """
    checked_flag("escape", escape)
    chat_format = format_named(name)
    controls = control_tokens(chat_format, tokenizer)
    spelled = [special.name for special, i in controls.items() if i not in tokenizer.control_ids]
    cleared, escaped = without_marks(checked_messages(messages), [*chat_format.marks, *spelled], escape)
    ids: list[int] = []
    for segment in _segments(_parts(chat_format, name, cleared)):
        if isinstance(segment, Special):
            ids.append(controls[segment])
        else:
            ids += _encoded(tokenizer, segment, not ids, controls.values())
    return ChatPrompt(ids, stop_ids(chat_format, tokenizer), escaped)


def format_named(name: object) -> ChatFormat:
    """The chat format of a name. Raises UsageError with the list of names."""
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    raise UsageError(f"chat_format={quote(name)}: needs one of {', '.join(FORMATS)}.")


def checked_format(name: str, tokenizer: Tokenizer) -> str:
    """The name itself. Raises UsageError for one that is no format's, or whose control tokens the tokenizer lacks."""
    control_tokens(format_named(name), tokenizer)
    return name


# ---------------------------------------------------------------- control tokens


def control_tokens(chat_format: ChatFormat, tokenizer: Tokenizer) -> dict[Special, int]:
    """The ids of a format's control tokens. Raises UsageError for one that the tokenizer does not have."""
    found = {special: _id(special, tokenizer) for special in chat_format.specials}
    missing = sorted(special.name for special, token in found.items() if token is None)
    if missing:
        raise UsageError(
            f"the chat format needs the control token {quote(missing[0])}, which this tokenizer does not have; name "
            f"another with chat_format=: one of {', '.join(FORMATS)}."
        )
    return {special: token for special, token in found.items() if token is not None}


def stop_ids(chat_format: ChatFormat, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: those of the format's stops that the tokenizer has."""
    return frozenset(token for stop in chat_format.stops if (token := _id(stop, tokenizer)) is not None)


def _id(special: Special, tokenizer: Tokenizer) -> int | None:
    """The id of a control token, also where the vocabulary has it as a piece like any other."""
    if special in (BOS, EOS):
        return tokenizer.bos_id if special == BOS else tokenizer.eos_id
    try:
        return tokenizer.special(special.name)
    except UsageError:
        ids = tokenizer.encode(special.name, bos=False, eos=False)
        return next((i for i in ids if tokenizer.spelling(i) == special.name), None)


# ---------------------------------------------------------------- messages into parts


def _parts(chat_format: ChatFormat, name: str, messages: Sequence[Message]) -> Iterator[Part]:
    """All parts in order, their contents filled in."""
    opening, turns = _opening(chat_format, name, list(messages))
    _check_order(chat_format, name, turns)
    yield from chat_format.begin
    yield from opening
    for role, text in turns:
        yield from _filled(chat_format.turns[role], text)
    yield from chat_format.reply


def _opening(chat_format: ChatFormat, name: str, messages: list[Message]) -> tuple[Parts, list[Message]]:
    """What the system says first, as parts, and the other messages, one of which has taken it up where it is merged."""
    said = messages.pop(0).text if messages[0].role == SYSTEM else chat_format.default_system
    if said is None:
        return (), messages
    parts = chat_format.turns.get(SYSTEM) if chat_format.system is None else chat_format.system
    if parts is None:
        raise UsageError(f"the chat format {name} has no system message; say it as the user.")
    opening = tuple(_filled(parts, said))
    if chat_format.merged_into is None:
        return opening, messages
    turns = [i for i, message in enumerate(messages) if message.role == USER]
    if turns:
        at = turns[0 if chat_format.merged_into == "first" else -1]
        merged = "".join(part for part in opening if isinstance(part, str)) + messages[at].text
        messages[at] = Message(USER, merged)
    return (), messages


def _check_order(chat_format: ChatFormat, name: str, turns: Sequence[Message]) -> None:
    """The roles behind a first system message, in an order that the format has."""
    roles = [role for role, _ in turns]
    if not roles or roles[-1] != USER:
        last = f"the last is of {roles[-1]}" if roles else "there is none behind the system's"
        raise UsageError(f"messages: {last}; one of user is needed at the end, which the assistant answers.")
    if chat_format.one_turn and len(roles) > 1:
        raise UsageError(f"the chat format {name} has one message, of user; got {len(roles)}.")
    for i, role in enumerate(roles):
        if role not in chat_format.turns or (chat_format.alternating and role != (USER, ASSISTANT)[i % 2]):
            raise UsageError(
                f"messages: the roles are {', '.join(roles)}; the chat format {name} has user and assistant in turn, "
                f"behind at most one message of system."
            )


def _filled(parts: Parts, text: str) -> Iterator[Part]:
    for part in parts:
        yield part.passed(text) if isinstance(part, Content) else part


def _segments(parts: Iterable[Part]) -> Iterator[str | Special]:
    """Parts with neighbouring texts as one; where a text was cut, it is two."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        if isinstance(part, Special):
            yield part
    if text:
        yield text


# ---------------------------------------------------------------- text into ids


def _encoded(tokenizer: Tokenizer, text: str, start: bool, controls: Iterable[int]) -> list[int]:
    """The ids of a text, none of which is a control token of the format, and which spell it whole."""
    ids = tokenizer.encode(text, bos=False, eos=False, start=start)
    if not set(controls).isdisjoint(ids):
        raise UsageError(
            f"the text {quote(text)} becomes a control token of the chat format with this tokenizer, and text never "
            f"becomes one; leave its name out of the messages."
        )
    if not _spells(tokenizer, ids, text):
        for character in dict.fromkeys(text):
            alone = tokenizer.encode(character, bos=False, eos=False, start=False)
            if not character.isspace() and not _spells(tokenizer, alone, character):
                raise UsageError(
                    f"this model's vocabulary cannot spell the character {quote(character)} (U+{ord(character):04X}), "
                    f"which stands in a message; leave it out, or replace it."
                )
    return ids


def _spells(tokenizer: Tokenizer, ids: Iterable[int], text: str) -> bool:
    """Whether the bytes of ids are those of a text, which may have got a space in front."""
    return b"".join(map(tokenizer.piece, ids)) in (text.encode(), b" " + text.encode())
