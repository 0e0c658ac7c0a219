"""What a tokenizer is, whatever kind of file it comes from.

* Text never becomes a control id: `</s>` or `<|eot_id|>` in a prompt is so many characters. A control id enters a
  sequence as an id, by its name: `tokenizer.special("<|eot_id|>")`.
* `encode` puts around a text what the model says stands there (BOS in front, or nothing), once.
* An id adds bytes to a text, not characters: one character may be spread over several ids. A control id adds nothing,
  nor does an id beyond the pieces, which exists where the model's embedding is padded to a rounder size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from npllama.errors import UsageError, checked_flag, quote


class Tokenizer(Protocol):
    """Text to ids and ids to text. Safe to use from several threads."""

    @property
    def n_pieces(self) -> int:
        """How many ids the tokenizer knows."""

    @property
    def vocab_size(self) -> int:
        """How many ids the model has, at least n_pieces."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text; None where the vocabulary has none."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text; None where nobody says which."""

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text gives."""

    @property
    def breaks(self) -> frozenset[int]:
        """Ids that end a character of which only the first bytes have come."""

    @property
    def whole_replacement(self) -> bool:
        """Whether bytes that begin a character and do not end it become one U+FFFD together, not one each."""

    def encode(
        self, text: str, bos: bool | None = None, eos: bool | None = None, start: bool = True, inside: bool = False
    ) -> list[int]:
        """The ids of a text, with BOS in front and EOS behind as asked; None: as the model says.

        start: whether the text stands at the very start, not behind a control id; some vocabularies put a space in
        front of it only there. inside: whether it goes on right behind other text: then none puts a space in front.
        Raises UsageError for what is no text, or holds half of a surrogate pair, and for a BOS or EOS that is asked for
        and does not exist.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Raises UsageError for an id out of range."""

    def piece(self, token: int) -> bytes:
        """What an id adds inside a text. Raises UsageError for an id out of range."""

    def first_piece(self, token: int) -> tuple[bytes, bool]:
        """What an id adds at the very start of a text, and whether the next id is still at the start."""

    def spelling(self, token: int) -> str:
        """How the vocabulary spells an id below n_pieces: the name of a control token, too."""

    def special(self, name: str) -> int:
        """The id of a control token, or of one that was added to the vocabulary. Raises UsageError for other names."""


def out_of_range(token: object, vocab_size: int) -> UsageError:
    """The error for what is no id."""
    return UsageError(
        f"the id {quote(token)} is not in the vocabulary; whole numbers from 0 to {vocab_size - 1} are needed."
    )


def special_id(names: Mapping[str, int], name: str) -> int:
    """The id of a name among those that a tokenizer has. Raises UsageError for a name that is none of them."""
    if isinstance(name, str) and name in names:
        return names[name]
    some = ", ".join(map(quote, sorted(names, key=names.__getitem__)[:6]))
    raise UsageError(
        f"there is no special token {quote(name)}; this tokenizer has {len(names)}, such as {some or 'none'}. "
        f"Name one of them, or encode it as text."
    )


def check_around(bos: bool | None, eos: bool | None) -> None:
    """Raise UsageError unless what is to stand around a text is True, False or None."""
    for name, asked in (("bos", bos), ("eos", eos)):
        checked_flag(name, asked, optional=True)


def check_text(text: object) -> str:
    """The text itself; UsageError for what is not a string, or holds half of a surrogate pair."""
    if not isinstance(text, str):
        raise UsageError(f"the text is of type {type(text).__name__}; a str is needed. Pass ids as ids.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text has the lone surrogate {quote(text[error.start])} at character {error.start}; "
            f"Unicode text without halves of surrogate pairs is needed. Decode the input with errors='replace'."
        ) from error
    return text
