"""What a call asks for, checked, and made into a matcher."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from npllama.errors import UsageError, quote
from npllama.generation.structured.choices import ChoiceMatcher
from npllama.generation.structured.constraint import Constraint
from npllama.generation.structured.matcher import Matcher
from npllama.generation.structured.schema import SEPARATORS, Shortest, literals, schema_of, whole
from npllama.generation.structured.vocabulary import Vocabulary
from npllama.options import FORMS
from npllama.text.protocol import check_text

if TYPE_CHECKING:
    from npllama.generation.structured.grammar import GrammarMatcher

MAX_KEPT = 16
"""Matchers, and closings of empty texts, that are kept for calls to come: the least recently used go."""

MAX_CHOICES, MAX_LITERALS, MAX_SOURCE = 10_000, 1000, 1 << 18
"""Texts to choose from; numbers with a fraction that are looked at; characters of a pattern, grammar or schema."""

PREFERENCES: Any = {
    "whitespace_flexible": False,
    "item_separator": SEPARATORS[0],
    "key_separator": SEPARATORS[1],
    "coerce_one_of": False,  # nothing is to be approximated
    "lenient": False,
    "json_allowed_escapes": 'bfnrt\\"',  # one way to write a character, so that no key is written in two
}
"""How llguidance is to read a schema."""


@dataclass(frozen=True)
class Structure:
    """A form that a text is to have: one of FORMS, and what it was given, as text."""

    kind: str
    source: tuple[str, ...]


def checked_structure(given: dict[str, Any]) -> Structure | None:
    """The form that the options of a call ask for (those of FORMS that are not None). Raises UsageError."""
    asked = [kind for kind in FORMS if given.get(kind) is not None]
    if not asked:
        return None
    if len(asked) > 1:
        raise UsageError(f"{asked[0]}= and {asked[1]}= both say what the text is to be; give one of them.")
    kind, value = asked[0], given[asked[0]]
    if kind == "choices":
        listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict))
        texts = tuple(islice(value, MAX_CHOICES + 1)) if listed else ()
        if len(texts) > MAX_CHOICES:
            raise UsageError(f"choices: are more than {MAX_CHOICES:,}; a regex or a grammar says the same shorter.")
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"choices={quote(value)}: needs a list of at least one text.")
        _short(kind, "".join(map(check_text, texts)))
        return Structure(kind, texts)
    if kind == "json_schema":
        return Structure(kind, (_short(kind, json.dumps(schema_of(value))),))
    if not isinstance(value, str) or not value:
        raise UsageError(
            f"{kind}={quote(value)}: needs text, {'a Lark grammar' if kind == 'grammar' else 'a pattern'}."
        )
    return Structure(kind, (_short(kind, check_text(value)),))


def _short(kind: str, source: str) -> str:
    """The same text; UsageError for one that would take long to read."""
    if len(source) > MAX_SOURCE:
        raise UsageError(f"{kind}: has {len(source):,} characters; at most {MAX_SOURCE:,} are read.")
    return source


def _of_schema(source: str) -> str:
    """A schema as llguidance's grammar. Raises UsageError for JSON that its reader does not bear."""
    from llguidance import LLMatcher

    try:
        found: str = LLMatcher.grammar_from_json_schema(source, overrides=PREFERENCES)
    except ValueError as error:
        raise UsageError(f"json_schema cannot be followed: {quote(str(error))}; change it.") from error
    return found


class Structures:
    """Makes constraints for the texts of one model; safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._matcher = lru_cache(MAX_KEPT)(self._new_matcher)
        self._closing = lru_cache(MAX_KEPT)(self._first_closing)

    def constraints(self, structure: Structure, most: int, stops: Iterable[str], n: int) -> Sequence[Constraint]:
        """What n texts of at most so many ids have to be, each: see `constraint`."""
        first = self.constraint(structure, most, stops)
        return [first, *(first.copy() for _ in range(n - 1))]

    def constraint(self, structure: Structure, most: int, stops: Iterable[str]) -> Constraint:
        """What a text of at most so many ids has to be.

        Raises UsageError for what is no regular expression, schema or grammar or is not supported, and where no
        text that fits into so many ids was found.
        """
        closing = self._closing(structure, most)
        if closing is None:
            raise UsageError(
                f"{structure.kind}: no text that fits was found in {most} tokens; raise max_tokens (or the context), "
                f"or ask for less."
            )
        return Constraint(self._vocabulary, self._copy(structure), closing, stops)

    def _copy(self, structure: Structure) -> Matcher:
        """A matcher at the beginning of a text."""
        with self._lock:
            return self._matcher(structure).copy()

    def _new_matcher(self, structure: Structure) -> Matcher:
        if structure.kind == "choices":
            return ChoiceMatcher(self._vocabulary, [text.encode() for text in structure.source])
        return self._of_llguidance(structure)

    def _first_closing(self, structure: Structure, most: int) -> list[int] | None:
        """The fewest ids found, at most so many, that write a whole text."""
        matcher = self._copy(structure)
        found = matcher.closing(None, (), most), self._shortest(structure, matcher)
        closing = min((ids for ids in found if ids is not None), key=len, default=None)
        return closing if closing is not None and len(closing) <= most else None

    @cached_property
    def _tools(self) -> tuple[Any, Any]:
        """The vocabulary as llguidance wants it, and the search for closings."""
        from npllama.generation.structured.closing import ClosingSearch
        from npllama.generation.structured.grammar import new_tokenizer

        if not self._vocabulary.ends:
            raise UsageError("this model has no id that ends a text; a regex, schema or grammar needs one.")
        return new_tokenizer(self._vocabulary), ClosingSearch(self._vocabulary)

    def _of_llguidance(self, structure: Structure, check: bool = True) -> GrammarMatcher:
        kind, source = structure.kind, structure.source[0]
        try:
            from llguidance import LLMatcher  # here, because it is an extra
        except ImportError as error:
            raise UsageError(
                f"{kind}= needs the package llguidance, which is not here: pip install 'npllama[structured]'."
            ) from error
        from npllama.generation.structured.grammar import GrammarMatcher, reason

        tokenizer, search = self._tools
        make = {"regex": LLMatcher.grammar_from_regex, "grammar": LLMatcher.grammar_from_lark}.get(kind, _of_schema)
        state = LLMatcher(tokenizer, make(source), log_level=0)
        probe = state.deep_copy()
        probe.compute_bitmask()  # some limits show only here
        said = reason(state) or reason(probe)
        if said:
            raise UsageError(f"{kind} cannot be followed: {said}; change it.")
        matcher = GrammarMatcher(self._vocabulary, search, state)
        if kind == "json_schema" and check:
            self._check_literals(json.loads(source))
        return matcher

    def _check_literals(self, schema: Any) -> None:
        """Refuse numbers that would be written as others."""
        for value in islice(literals(schema), MAX_LITERALS):
            alone = self._of_llguidance(Structure("json_schema", (json.dumps({"enum": [value, None]}),)), False)
            texts = [json.dumps(one, ensure_ascii=False, separators=SEPARATORS) for one in (value, whole(value))]
            found = [self._vocabulary.fewest(text.encode()) for text in texts]
            if not any(ids is not None and alone.completes(ids) for ids in found):
                raise UsageError(
                    f"json_schema cannot be followed: {quote(value)} would be written as another number; change it."
                )

    def _shortest(self, structure: Structure, matcher: Matcher) -> list[int] | None:
        """The closing of an empty text that follows from a schema alone."""
        if structure.kind != "json_schema":
            return None

        def cost(text: str) -> float:
            return len(self._vocabulary.fewest(text.encode()) or text)

        text = Shortest(json.loads(structure.source[0]), cost).text()
        ids = None if text is None else self._vocabulary.fewest(text.encode())
        return list(ids) if ids is not None and matcher.completes(ids) else None
