"""The parts of a tokenizer.json that are known: normalizers, pre-tokenizers, templates, decoders.

Each part is obeyed exactly, or refused by its name: one that is overlooked gives other ids without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from npllama.errors import quote
from npllama.text.bpe.splitting import DIGIT, DIGITS, GPT2, PATTERNS
from npllama.text.vocabulary import MARK

INSTEAD = "use the tokenizer.model of the checkpoint if it has one"
Steps = tuple[tuple[str, ...], ...]


class PartError(ValueError):
    """What is wrong with a file; whoever reads it says which file."""


def check_keys(where: str, found: dict[str, Any], known: Collection[str]) -> None:
    """Refuse a key that nobody knows: it may change ids."""
    for key in found:
        if key not in known:
            raise PartError(f"{where}: the key {quote(key)} is not known, and may change ids; {INSTEAD}")


def text_of(where: str, found: dict[str, Any], key: str) -> str:
    """A string of at least one character, all of them whole."""
    value = found.get(key)
    if not isinstance(value, str) or not value or any("\ud800" <= c <= "\udfff" for c in value):
        raise PartError(f"{where}: {key} is {quote(value)}; text of at least one character is needed")
    return value


def flag(where: str, found: dict[str, Any], key: str, default: bool | None = None) -> bool:
    """True or false; the default, if there is one, for what is absent or null."""
    value = found.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, bool):
        raise PartError(f"{where}: {key} is {quote(value)}; true or false is needed")
    return value


def _steps(kind: str, part: object, inner: str) -> list[dict[str, Any]]:
    """The parts of a Sequence in order, or the only one."""
    if part is None:
        return []
    if not isinstance(part, dict):
        raise PartError(f"{kind} is {quote(part)}; an object is needed")
    if part.get("type") != "Sequence":
        return [part]
    check_keys(f"{kind} Sequence", part, {"type", inner})
    parts = part.get(inner)
    if not isinstance(parts, list):
        raise PartError(f"{kind} Sequence: {inner} is {quote(parts)}; a list is needed")
    return [step for item in parts for step in _steps(kind, item, inner)]


def _unsupported(kind: str, part: dict[str, Any], known: str) -> PartError:
    return PartError(f"{kind} {quote(part.get('type'))} is not supported, and would change ids; {known} are. {INSTEAD}")


# ---------------------------------------------------------------- normalizers


def normalizer(part: object) -> Steps:
    """What is done to a text before it is cut: see Rules.normalizer."""
    found: list[tuple[str, ...]] = []
    for step in _steps("normalizer", part, "normalizers"):
        kind = step.get("type")
        if kind == "Prepend":
            check_keys("normalizer Prepend", step, {"type", "prepend"})
            found.append(("prepend", text_of("normalizer Prepend", step, "prepend")))
        elif kind == "Replace":
            where = "normalizer Replace"
            check_keys(where, step, {"type", "pattern", "content"})
            found.append(("replace", _string(where, step), text_of(where, step, "content")))
        else:
            raise _unsupported("normalizer", step, "Prepend and Replace of a string")
    return tuple(found)


def _string(where: str, step: dict[str, Any]) -> str:
    """The text of a pattern {"String": text}."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or set(pattern) != {"String"}:
        raise PartError(f"{where}: the pattern {quote(pattern)} is not supported; a string is. {INSTEAD}")
    return text_of(where, pattern, "String")


# ---------------------------------------------------------------- pre-tokenizers


def pre_tokenizer(part: object) -> tuple[Steps, bool]:
    """(How a text is cut into words: see Rules.stages, whether words are then bytes)."""
    stages: list[tuple[str, ...]] = []
    byte_level = False
    for step in _steps("pre_tokenizer", part, "pretokenizers"):
        kind = step.get("type")
        if byte_level:
            raise PartError(f"pre_tokenizer {quote(kind)} after ByteLevel is not supported; ByteLevel must be the last")
        if kind == "Split":
            stages.append(("pattern", _split_pattern(step)))
        elif kind == "Digits":
            check_keys("pre_tokenizer Digits", step, {"type", "individual_digits"})
            alone = flag("pre_tokenizer Digits", step, "individual_digits", False)
            stages.append(("pattern", DIGIT if alone else DIGITS))
        elif kind == "ByteLevel":
            byte_level = True
            stages += _byte_level(step)
        elif kind == "Metaspace" and not stages:
            stages.append(_metaspace("pre_tokenizer Metaspace", step))
        else:
            raise _unsupported("pre_tokenizer", step, "Split at a known pattern, Digits, ByteLevel, Metaspace in front")
    if byte_level and stages and stages[0][0] == "metaspace":
        raise PartError("pre_tokenizer: Metaspace and ByteLevel together are not supported")
    return tuple(stages), byte_level


def _split_pattern(step: dict[str, Any]) -> str:
    where = "pre_tokenizer Split"
    check_keys(where, step, {"type", "pattern", "behavior", "invert"})
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) and len(pattern) == 1 else None
    if regex not in PATTERNS or regex in (DIGIT, DIGITS):
        raise PartError(f"{where}: the pattern {quote(pattern if regex is None else regex)} is not known; {INSTEAD}")
    if step.get("behavior") != "Isolated" or flag(where, step, "invert", False):
        found = f"behavior {quote(step.get('behavior'))}, invert {quote(step.get('invert'))}"
        raise PartError(f"{where}: {found} is not supported; Isolated, not inverted, is. {INSTEAD}")
    return str(regex)


def _byte_level(step: dict[str, Any]) -> list[tuple[str, ...]]:
    where = "pre_tokenizer ByteLevel"
    check_keys(where, step, {"type", "add_prefix_space", "trim_offsets", "use_regex"})
    prefix = [("prefix", " ")] if flag(where, step, "add_prefix_space") else []
    pattern = [("pattern", GPT2)] if flag(where, step, "use_regex", True) else []
    return [*prefix, *pattern]


def _metaspace(where: str, step: dict[str, Any]) -> tuple[str, ...]:
    """The stage of a Metaspace; older files say add_prefix_space instead of prepend_scheme."""
    check_keys(where, step, {"type", "replacement", "prepend_scheme", "add_prefix_space", "split", "str_rep"})
    if step.get("replacement") != MARK:
        raise PartError(f"{where}: replacement is {quote(step.get('replacement'))}; {quote(MARK)} is needed. {INSTEAD}")
    scheme = step.get("prepend_scheme", "always")
    if scheme not in ("always", "first", "never"):
        raise PartError(f"{where}: prepend_scheme is {quote(scheme)}; always, first or never is needed")
    if scheme != "never" and not flag(where, step, "add_prefix_space", True):
        if "prepend_scheme" in step:
            raise PartError(f"{where}: add_prefix_space is false, but prepend_scheme {quote(scheme)}; one is wrong")
        scheme = "never"
    return ("metaspace", MARK, scheme, "split" if flag(where, step, "split", True) else "")


# ---------------------------------------------------------------- templates


def template(part: object) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The ids that stand before and after a text; None where the file has no template."""
    found = None
    for step in _steps("post_processor", part, "processors"):
        kind = step.get("type")
        if kind == "TemplateProcessing" and found is None:
            found = _single(step)
        elif kind != "ByteLevel":  # which is about offsets
            raise _unsupported("post_processor", step, "ByteLevel and one TemplateProcessing")
    return found


def _single(step: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    where = "post_processor TemplateProcessing"
    check_keys(where, step, {"type", "single", "pair", "special_tokens"})
    pieces, tokens = step.get("single"), step.get("special_tokens")
    if not isinstance(pieces, list) or not isinstance(tokens, dict):
        raise PartError(f"{where}: single is {quote(pieces)}; a list, and an object special_tokens, is needed")
    sides: list[list[int]] = [[]]
    for piece in pieces:
        (kind, what), *more = piece.items() if isinstance(piece, dict) and piece else [("", None)]
        name = what.get("id") if isinstance(what, dict) else None
        if kind == "SpecialToken" and not more and isinstance(name, str):
            sides[-1] += _template_ids(where, name, tokens.get(name))
        elif kind == "Sequence" and not more and name == "A" and len(sides) == 1:
            sides.append([])
        else:
            raise PartError(f"{where}: single has {quote(piece)}; special tokens around one text are needed")
    if len(sides) == 1:
        raise PartError(f"{where}: single has no text; special tokens around one text are needed")
    return tuple(sides[0]), tuple(sides[1])


def _template_ids(where: str, name: str, token: object) -> list[int]:
    ids = token.get("ids") if isinstance(token, dict) else None
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise PartError(f"{where}: special_tokens says {quote(token)} for {quote(name)}; a list of ids is needed")
    return ids


# ---------------------------------------------------------------- decoders


def decoder(part: object, byte_level: bool, byte_fallback: bool) -> bool:
    """Whether decoding takes away the space in front of a text. Refuses a decoder that does not fit the vocabulary."""
    steps = _steps("decoder", part, "decoders")
    kinds = [step.get("type") for step in steps]
    if byte_level:
        if kinds != ["ByteLevel"]:
            raise PartError(f"decoder {quote(kinds)} is not supported with the pre-tokenizer ByteLevel; ByteLevel is")
        return False
    if kinds == ["Metaspace"]:
        return _metaspace("decoder Metaspace", steps[0])[2] != "never"
    strip = False
    for step in steps:
        kind = step.get("type")
        if kind == "Replace":
            if (_string("decoder Replace", step), step.get("content")) != (MARK, " "):
                raise PartError(f"decoder Replace: {quote(step)} is not supported; {quote(MARK)} by a space is")
        elif kind == "Strip":
            if (step.get("content"), step.get("start"), step.get("stop")) not in ((" ", 1, 0), (" ", 0, 0)):
                raise PartError(f"decoder Strip: {quote(step)} is not supported; one space at the start is")
            strip = strip or step["start"] == 1
        elif kind not in ("ByteFallback", "Fuse"):
            raise _unsupported("decoder", step, "Replace, ByteFallback, Fuse, Strip, Metaspace and ByteLevel")
    if "Replace" not in kinds or ("ByteFallback" in kinds) != byte_fallback:
        raise PartError(f"decoder {quote(kinds)} does not fit; Replace, and ByteFallback for bytes, is needed")
    return strip
