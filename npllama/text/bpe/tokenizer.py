"""The tokenizer of a byte pair vocabulary, whichever file it was read from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

from npllama.errors import ModelError, UsageError
from npllama.text import decoding
from npllama.text.bpe.added import LeftmostLongest, LongestFirst
from npllama.text.bpe.words import Words
from npllama.text.protocol import check_around, check_text, out_of_range, special_id
from npllama.text.vocabulary import MARK, Rules, Vocabulary, inside_rules, normalize

_BYTE = re.compile(rb"<0x([0-9A-F]{2})>\Z")


class BpeTokenizer:
    """Byte pair encoding over bytes or characters: see text/protocol.py for what a tokenizer promises.

    vocab_size is the number of ids that the model has, by default the number of tokens. add_bos and add_eos say what
    `encode` does unless told otherwise; None: as the vocabulary says. Raises ModelError for a vocabulary that is larger
    than the model's, or has no BOS or EOS that is to be added.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab_size: int | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        rules = vocabulary.rules
        self.vocabulary = vocabulary
        self.n_pieces = len(vocabulary.tokens)
        self.vocab_size = self.n_pieces if vocab_size is None else vocab_size
        if self.vocab_size < self.n_pieces:
            raise ModelError(
                f"the tokenizer has {self.n_pieces} pieces, but the model only {vocab_size} ids: they do not belong "
                f"together. Use the tokenizer that came with the checkpoint."
            )
        self.bos_id, self.eos_id = rules.bos_id, rules.eos_id
        self.add_bos = bool(rules.prefix) if add_bos is None else add_bos
        self.add_eos = bool(rules.suffix) if add_eos is None else add_eos
        self._bos = rules.prefix or (() if rules.bos_id is None else (rules.bos_id,))
        self._eos = rules.suffix or (() if rules.eos_id is None else (rules.eos_id,))
        if (self.add_bos and not self._bos) or (self.add_eos and not self._eos):
            raise ModelError(
                "the model puts BOS or EOS around a text, but the tokenizer has none; export the checkpoint again."
            )
        self.control_ids = frozenset(rules.control) - {rules.unknown}
        self.breaks: frozenset[int] = frozenset()
        self.whole_replacement = rules.byte_level
        self._pieces = _pieces(vocabulary)
        self._names = {token: name for name, token in rules.names.items()}
        self._split = _Pipeline(rules)
        self._words = Words(vocabulary)

    def encode(
        self, text: str, bos: bool | None = None, eos: bool | None = None, start: bool = True, inside: bool = False
    ) -> list[int]:
        """The ids of a text, with what stands around it: see Tokenizer.encode."""
        check_around(bos, eos)
        before = self._bos if (self.add_bos if bos is None else bos) else ()
        after = self._eos if (self.add_eos if eos is None else eos) else ()
        if (bos and not before) or (eos and not after):
            raise UsageError(
                f"{'bos' if bos and not before else 'eos'}=True: this tokenizer has no such token; leave it out."
            )
        ids: list[int] = []
        way = self._inside if inside else self
        for part in way._split(check_text(text), start):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(way._words.ids(part))
        if not self.control_ids.isdisjoint(ids):
            raise ModelError(
                "the vocabulary has a control token that this text becomes, and text never becomes one; it is "
                "damaged: export the checkpoint again."
            )
        return [*before, *ids, *after]

    @cached_property
    def _inside(self) -> BpeTokenizer:
        """The same vocabulary without what rules put in front of a text."""
        rules = inside_rules(self.vocabulary.rules)
        if rules == self.vocabulary.rules:
            return self
        return BpeTokenizer(replace(self.vocabulary, rules=rules), self.vocab_size, add_bos=False, add_eos=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: see Tokenizer.decode."""
        return decoding.decode(self, ids)

    def piece(self, token: int) -> bytes:
        """What an id adds inside a text. Raises UsageError for an id out of range."""
        try:
            if 0 <= token < self.vocab_size:
                return self._pieces[token] if token < self.n_pieces else b""
        except TypeError:
            pass
        raise out_of_range(token, self.vocab_size)

    def first_piece(self, token: int) -> tuple[bytes, bool]:
        """What an id adds at the very start of a text, and whether the next id is still at the start."""
        piece = self.piece(token)
        if self.vocabulary.rules.strip and piece.startswith(b" "):
            return piece[1:], False
        return piece, not piece

    def spelling(self, token: int) -> str:
        """How the vocabulary spells an id: the name of a control token, too."""
        return self._names.get(token) or self.vocabulary.tokens[token].decode("utf-8", "replace")

    def special(self, name: str) -> int:
        """The id of a control or added token by its name. Raises UsageError for a name that is none."""
        return special_id(self.vocabulary.rules.names, name)


def _pieces(vocabulary: Vocabulary) -> list[bytes]:
    """What each id adds to a text."""
    rules = vocabulary.rules
    pieces = list(vocabulary.tokens)
    for token in rules.added:
        spelled = normalize(token.content, rules.normalizer) if token.normalized else token.content
        pieces[token.id] = spelled.encode("utf-8")
    if not rules.byte_level:
        mark = MARK.encode()
        pieces = [piece.replace(mark, b" ") for piece in pieces]
        if rules.byte_fallback:
            for i, piece in enumerate(pieces):
                if len(piece) == 6 and (found := _BYTE.match(piece)):
                    pieces[i] = bytes([int(found[1], 16)])
    for i in rules.control:
        pieces[i] = b""
    return pieces


class _Pipeline:
    """From a text to the words that merge: added tokens, normalizer, pre-tokenizer."""

    def __init__(self, rules: Rules) -> None:
        self._normalizer = rules.normalizer
        kind = LongestFirst if rules.longest_first else LeftmostLongest
        self._raw = kind([(token.content, token) for token in rules.added if not token.normalized])
        spelled = [(normalize(token.content, rules.normalizer), token) for token in rules.added if token.normalized]
        self._normalized = kind(spelled)
        self._metaspace = rules.stages[0][1:] if rules.stages and rules.stages[0][0] == "metaspace" else None

    def __call__(self, text: str, start: bool) -> Iterator[str | int]:
        """The parts of a text in order: words as strings, and ids of added tokens."""
        for part in self._raw.cut(text):
            if isinstance(part, int):
                yield part
            else:
                for piece in self._normalized.cut(normalize(part, self._normalizer)):
                    if isinstance(piece, int) or self._metaspace is None:
                        yield piece
                    else:
                        yield from _metaspace(piece, start, *self._metaspace)
                    start = False
            start = False


def _metaspace(text: str, start: bool, mark: str, scheme: str, split: str) -> list[str]:
    """Spaces as marks, one in front of the text where the scheme says so; each mark begins a piece if it splits."""
    text = text.replace(" ", mark)
    if (scheme == "always" or (scheme == "first" and start)) and not text.startswith(mark):
        text = mark + text
    return re.findall(f"{re.escape(mark)}?[^{re.escape(mark)}]+|{re.escape(mark)}", text) if split else [text]
