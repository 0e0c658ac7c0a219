"""The vocabulary inside a GGUF file, from its metadata: `llama` (SentencePiece's BPE) and `gpt2` (over bytes).

The reference is llama.cpp: tokens of type user-defined are looked for the longest first, and a byte that is no token
keeps its neighbours apart. Differs: no text gives a control token here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npllama.errors import CheckpointError, quote, whole_number
from npllama.text.bpe import alphabet
from npllama.text.bpe.added import AddedToken
from npllama.text.bpe.merging import MAX_IDS
from npllama.text.bpe.splitting import NAMED
from npllama.text.vocabulary import MARK, Rules, Vocabulary, problem, splits

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_CHARACTERS = 2 << 20
MAX_LENGTH = 512

PRE_TOKENIZERS = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "lfm2", "pixtral"), "llama-bpe"
    ),
    **dict.fromkeys(("smollm", "refact", "starcoder", "command-r"), "smollm"),
    **{name: name for name in ("gpt-2", "qwen2", "deepseek-llm", "deepseek-coder")},
}
"""tokenizer.ggml.pre -> splitting.NAMED."""
_WHOLE_WORDS = _WITH_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral"}
_PADDING = re.compile(r"\[PAD\d+\]\Z")
_P = "tokenizer.ggml."


def read_gguf_vocabulary(metadata: Mapping[str, Any], file: str = "GGUF") -> Vocabulary:
    """The vocabulary that the metadata of a GGUF file describe (keys tokenizer.ggml.*; arrays as lists or NumPy's).

    Raises CheckpointError for a kind of tokenizer or a pre-tokenizer that is not known, and for what is malformed.
    """
    source = _Source(metadata, file)
    model = metadata.get(f"{_P}model")
    if model == "llama":
        vocabulary = _sentencepiece(source)
    elif model == "gpt2":
        vocabulary = _byte_level(source)
    else:
        raise source.error(f"{_P}model is {quote(model)}; llama or gpt2 is needed. Get the model in another conversion")
    if found := problem(vocabulary):
        raise source.error(f"found {found} in its vocabulary; the file is damaged, get it again")
    return vocabulary


class _Source:
    """The checked metadata of a vocabulary."""

    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self.metadata, self.file = metadata, file
        self.tokens = self.strings("tokens")
        self.kinds = self._kinds()
        if not 0 < len(self.tokens) <= MAX_IDS:
            raise self.error(f"{len(self.tokens):,} tokens; 1 to {MAX_IDS:,} are read")
        longest, total = max(map(len, self.tokens)), sum(map(len, self.tokens))
        if longest > MAX_LENGTH or total > MAX_CHARACTERS:
            raise self.error(f"tokens of {longest:,} characters, {total:,} in all; that is no vocabulary")

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {text}.")

    def strings(self, key: str) -> list[str]:
        """An array of strings."""
        found = self.metadata.get(_P + key)
        values = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else None
        if values is None or not set(map(type, values)) <= {str}:
            raise self.error(f"{_P}{key} is no array of strings, which a vocabulary needs; convert the model again")
        try:
            "".join(values).encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(f"{_P}{key} has a string that is not UTF-8; the file is damaged") from error
        return values

    def _kinds(self) -> list[int]:
        found = self.metadata.get(f"{_P}token_type")
        kinds = np.ones(len(self.tokens), np.int64) if found is None else self.numbers("token_type", "iu")
        return kinds.tolist()

    def numbers(self, key: str, kinds: str) -> np.ndarray:
        """An array of numbers, one for each token."""
        try:
            found = np.asarray(self.metadata.get(_P + key))
        except (ValueError, OverflowError):
            found = np.empty(0)
        if found.shape != (len(self.tokens),) or found.dtype.kind not in kinds or not np.all(np.isfinite(found)):
            raise self.error(f"{_P}{key} has not one number for each token; the file is damaged")
        return found

    def id(self, key: str, default: int | None) -> int | None:
        """A special id; the default where the file does not give it."""
        given = self.metadata.get(f"{_P}{key}_token_id", default)
        found = whole_number(given)
        if given is not None and (found is None or not 0 <= found < len(self.tokens)):
            raise self.error(f"{_P}{key}_token_id is {quote(given)} among {len(self.tokens):,} tokens")
        return found

    def flag(self, key: str, default: bool) -> bool:
        found = self.metadata.get(_P + key, default)
        if not isinstance(found, (bool, np.bool_)):
            raise self.error(f"{_P}{key} is {quote(found)}; true or false is needed")
        return bool(found)

    def of_kind(self, *kinds: int) -> list[int]:
        """The ids of some types of tokens."""
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]

    def added(self) -> tuple[AddedToken, ...]:
        """What is looked for in a text before anything else. What fills a vocabulary up is no text."""
        user_defined = [i for i in self.of_kind(USER_DEFINED) if self.tokens[i] and not self.is_padding(i)]
        return tuple(AddedToken(i, self.tokens[i]) for i in user_defined)

    def is_padding(self, token: int) -> bool:
        return _PADDING.match(self.tokens[token]) is not None

    def around(self, bos: int | None, eos: int | None, add_bos: bool) -> dict[str, Any]:
        """What stands before and after a text, what no text gives, and what has a name."""
        bos, eos = self.id("bos", bos), self.id("eos", eos)
        prefix = (bos,) if bos is not None and self.flag("add_bos_token", add_bos) else ()
        suffix = (eos,) if eos is not None and self.flag("add_eos_token", False) else ()
        control = self.of_kind(CONTROL, UNKNOWN, UNUSED) + [i for i in self.of_kind(USER_DEFINED) if self.is_padding(i)]
        named = self.of_kind(CONTROL, UNKNOWN, USER_DEFINED)
        return {
            "prefix": prefix,
            "suffix": suffix,
            "bos_id": bos,
            "eos_id": eos,
            "control": tuple(sorted(control)),
            "added": self.added(),
            "longest_first": True,
            "gaps": True,
            "names": {self.tokens[i]: i for i in reversed(named)},
        }


# ---------------------------------------------------------------- llama: SentencePiece's BPE


def _sentencepiece(source: _Source) -> Vocabulary:
    """Pieces and scores: two neighbours merge when together they are a piece, that of the highest score first."""
    if source.flag("remove_extra_whitespaces", False):
        raise source.error(f"{_P}remove_extra_whitespaces is true, which is not supported; get another conversion")
    ids = {source.tokens[i]: i for i in reversed(source.of_kind(NORMAL, USER_DEFINED)) if not source.is_padding(i)}
    names = {source.tokens[i] for i in source.of_kind(BYTE)}
    if not all(f"<0x{byte:02X}>" in names for byte in range(256)):
        raise source.error("its vocabulary lacks a token for one of the 256 bytes; get the model in another conversion")
    long = {piece: i for piece, i in ids.items() if len(piece) > 1}
    # Two characters may merge that are no pieces themselves.
    letters = sorted({c for piece in long for c in piece} - ids.keys())
    with_letters = {**ids, **{letter: len(source.tokens) + i for i, letter in enumerate(letters)}}
    pairs = np.array(splits(long, with_letters), dtype=np.int64).reshape(-1, 3)
    _, rank = np.unique(-source.numbers("scores", "fiu").astype(np.float64), return_inverse=True)
    merges = np.column_stack([pairs[:, 0], pairs[:, 1], rank[pairs[:, 2]], pairs[:, 2]]).astype(np.int32)
    space = (("prepend", MARK),) if source.flag("add_space_prefix", True) else ()
    unreachable = sorted({*range(len(source.tokens))} - set(ids.values()))
    around = source.around(1, 2, True)
    rules = Rules(
        byte_level=False,
        normalizer=(*space, ("replace", " ", MARK)),
        byte_fallback=True,
        letters="".join(letters),
        strip=bool(space),
        unreachable=tuple(unreachable),
        **around,
    )
    return Vocabulary(rules, [token.encode("utf-8") for token in source.tokens], merges)


# ---------------------------------------------------------------- gpt2: BPE over bytes


def _byte_level(source: _Source) -> Vocabulary:
    """Tokens in the alphabet of bytes, and merges in their order."""
    pre = source.metadata.get(f"{_P}pre")
    if pre not in PRE_TOKENIZERS:
        raise source.error(
            f"{_P}pre is {quote(pre)}: how text is cut into words is not known, and another way would give other ids; "
            f"one of {', '.join(sorted(PRE_TOKENIZERS))} is needed. Get the model in another conversion"
        )
    around = source.around(None, None, pre in _WITH_BOS)
    tokens, odd = alphabet.tokens_of(source.tokens)
    taken = {*around["control"], *source.of_kind(USER_DEFINED)}
    rules = Rules(
        byte_level=True,
        stages=tuple(("pattern", pattern) for pattern in NAMED[PRE_TOKENIZERS[pre]]),
        whole_words=pre in _WHOLE_WORDS,
        unreachable=tuple(sorted({*odd, *source.of_kind(USER_DEFINED)})),
        **around,
    )
    return Vocabulary(rules, tokens, _merges(source, taken))


def _merges(source: _Source, taken: set[int]) -> np.ndarray:
    """(M, 4) int32: left, right, rank, result of the merges "a b", cut at the first space that is not in front."""
    ids = {token: i for i, token in enumerate(source.tokens)}
    merges = source.strings("merges")
    if len(merges) > MAX_IDS:
        raise source.error(f"{len(merges):,} merges; at most {MAX_IDS:,} are read")
    found = []
    for rank, spelled in enumerate(merges):
        cut = spelled.find(" ", 1)
        left, right = ids.get(spelled[:cut]), ids.get(spelled[cut + 1 :])
        result = ids.get(spelled[:cut] + spelled[cut + 1 :])
        if cut < 0 or left is None or right is None or result is None:
            raise source.error(f"{_P}merges has {quote(spelled)}, which is no pair of tokens that make one")
        if result not in taken:
            found.append((left, right, rank, result))
    return np.array(found, dtype=np.int32).reshape(-1, 4)
