"""The ids of a stretch of text without added tokens: cut it into words, make symbols of each, merge them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from npllama.text.bpe.cuts import cutter
from npllama.text.bpe.merging import WordCache, merge, merge_table
from npllama.text.bpe.splitting import Splitter, is_about_words
from npllama.text.vocabulary import Rules, Vocabulary

GAP = -1
"""The symbol of what is left out but keeps its neighbours apart: it merges with nothing."""


class Words:
    """The words of a vocabulary's texts, their ids remembered."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        rules = vocabulary.rules
        self._table = merge_table(vocabulary.merges)
        self._symbols = ByteSymbols(vocabulary) if rules.byte_level else CharacterSymbols(vocabulary)
        self._whole = _whole_words(vocabulary) if rules.whole_words else {}
        self._stages, self._later = _stages(rules)
        if not rules.byte_level and not self._later and (cut := cutter(vocabulary)) is not None:
            self._stages.append(cut)
        self._cache = WordCache(self._encode)

    def ids(self, text: str) -> Iterable[int]:
        """The ids of a stretch of text that the pre-tokenizer sees as one."""
        return chain.from_iterable(map(self._cache.__getitem__, _cut([text], self._stages)))

    def _encode(self, word: str) -> list[int]:
        ids: list[int] = []
        for piece in _cut([word], self._later):
            whole = self._whole.get(piece.encode("utf-8")) if self._whole else None
            ids += [whole] if whole is not None else self._symbols.ids(merge(self._symbols(piece), self._table))
        return ids


# ---------------------------------------------------------------- words


Stage = Callable[[str], list[str]]


def _stages(rules: Rules) -> tuple[list[Stage], list[Stage]]:
    """The stages that leave about a word each, whose ids are worth remembering, and those that cut a word again."""
    found, n_first = [], None
    for kind, what in (stage for stage in rules.stages if stage[0] != "metaspace"):
        found.append(_with_space(what) if kind == "prefix" else Splitter(what))
        if n_first is None and is_about_words(what):
            n_first = len(found)
    return found[:n_first], found[len(found) if n_first is None else n_first :]


def _with_space(space: str) -> Stage:
    return lambda piece: [piece if piece.startswith(space) else space + piece]


def _cut(pieces: list[str], stages: Sequence[Stage]) -> list[str]:
    """Each stage cuts each piece that the one before left."""
    for stage in stages:
        pieces = stage(pieces[0]) if len(pieces) == 1 else list(chain.from_iterable(map(stage, pieces)))
    return pieces


def _whole_words(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The tokens that a word can be as a whole."""
    words = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
    for token in (*vocabulary.rules.unreachable, *vocabulary.rules.control):
        if words.get(vocabulary.tokens[token]) == token:
            del words[vocabulary.tokens[token]]
    words.pop(b"", None)
    return words


# ---------------------------------------------------------------- symbols


class _Symbols:
    """What a word begins as, and what its merged symbols are as ids."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def ids(self, symbols: list[int]) -> list[int]:
        """Merged symbols as ids."""
        return [symbol for symbol in symbols if symbol != GAP] if self._rules.gaps else symbols

    def fallback(self, unit: object) -> Sequence[int] | None:
        """The ids of what is no token, where there are some."""

    def resolve(self, units: Iterable[object], found: Iterable[int | None]) -> list[int]:
        """Symbols of the units of a word, where some are no token (None).

        As the package tokenizers has it, where ids of an unknown character wait for the next known one: those of a
        character that falls back on its bytes overtake them.
        """
        unknown, symbols, waiting = self._rules.unknown, list[int](), list[int]()
        for unit, token in zip(units, found, strict=True):
            if token is not None:
                symbols += [*waiting, token]
                waiting = []
            elif fallback := self.fallback(unit):
                symbols += fallback
            elif unknown is not None:
                if not (waiting and self._rules.fuse_unknown):
                    symbols += waiting
                    waiting = [unknown]
            elif self._rules.gaps:
                symbols.append(GAP)
        return symbols + waiting


class ByteSymbols(_Symbols):
    """The bytes of a word."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary.rules)
        barred = {*vocabulary.rules.unreachable, *vocabulary.rules.control}
        tokens = enumerate(vocabulary.tokens)
        single = {token[0]: i for i, token in tokens if len(token) == 1 and i not in barred}
        self._of_byte = [single.get(byte) for byte in range(256)]
        self._complete = len(single) == 256

    def __call__(self, word: str) -> list[int]:
        data = word.encode("utf-8")
        found = [self._of_byte[byte] for byte in data]
        if self._complete:
            return found  # type: ignore[return-value]
        return self.resolve(data, found)


class CharacterSymbols(_Symbols):
    """The characters of a word; of one that is no token its bytes, or the unknown token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        rules, n = vocabulary.rules, len(vocabulary.tokens)
        super().__init__(rules)
        barred = {*rules.unreachable, *rules.control}
        texts = [token.decode("utf-8") for token in vocabulary.tokens]
        self._of_character = {text: i for i, text in enumerate(texts) if len(text) == 1 and i not in barred}
        self._of_character.update({letter: i for i, letter in enumerate(rules.letters, n)})
        numbers = {text: i for i, text in enumerate(texts) if len(text) == 6}
        self._of_byte = [numbers.get(f"<0x{byte:02X}>") if rules.byte_fallback else None for byte in range(256)]
        self._letters = {i: self.resolve([letter], [None]) for i, letter in enumerate(rules.letters, n)}

    def __call__(self, word: str) -> list[int]:
        found = list(map(self._of_character.get, word))
        if None in found:
            return self.resolve(word, found)
        return found  # type: ignore[return-value]

    def ids(self, symbols: list[int]) -> list[int]:
        """Merged symbols as ids: a character that is no token, and was not merged, is its bytes."""
        if not self._letters:
            return super().ids(symbols)
        return super().ids([token for symbol in symbols for token in self._letters.get(symbol, (symbol,))])

    def fallback(self, unit: object) -> Sequence[int] | None:
        """The ids of a character's bytes, all or none."""
        found = [self._of_byte[byte] for byte in str(unit).encode("utf-8")]
        return None if None in found else found  # type: ignore[return-value]
