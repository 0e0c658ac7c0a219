"""Text to ids and ids to text: a SentencePiece model, and the rules that keep text and control ids apart.

* Text never becomes a control id: `</s>` in a prompt is four characters. Control ids enter a sequence only as ids.
  (A piece that the file calls user-defined is text: it is what its characters encode to.)
* Text gets BOS in front once, also when it begins with the characters `<s>`; where the model or the caller says so, it
  gets none, and EOS behind it.
* A control id adds nothing to a text. Nor does an id beyond the pieces, which exists where the model's embedding is
  padded to a rounder size than its tokenizer: such an id can be sampled, and must not end a text with an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from itertools import compress
from pathlib import Path

import sentencepiece

from npllama.errors import ModelError, UsageError, quote
from npllama.system import signatures
from npllama.system.regular_files import open_regular, read_up_to
from npllama.text import decoding
from npllama.text.protocol import check_around, check_text, out_of_range, special_id

MAX_FILE_BYTES = 32 << 20
"""Largest tokenizer file that is read (LLaMA 2's has 500 KB; vocabularies of 256,000 pieces about 5 MB)."""
MAX_PIECES = 3 << 17

NO_SPACE_IN_FRONT = b"\x1a\x02\x18\x00"
"""In a model's file: normalizer_spec.add_dummy_prefix is false (fields 3 and 3 of sentencepiece_model.proto)."""
SPACE = "\u2581"
"""How a piece spells a space."""


class SentencePieceTokenizer:
    """A SentencePiece model: ids of a text, text of ids. See text/protocol.py for what a tokenizer promises.

    vocab_size is the number of ids that the model has (at least the number of pieces; by default just that). add_bos
    and add_eos say what `encode` does unless told otherwise.
    Raises ModelError for a file that is missing, malformed, or belongs to another model. Safe to use
    from several threads.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocab_size: int | None = None,
        add_bos: bool = True,
        add_eos: bool = False,
    ) -> None:
        self.path, self.add_bos, self.add_eos = Path(path), add_bos, add_eos
        self._processor = _load(self.path)
        self.n_pieces: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        _check_ids(self.path, self.n_pieces, self.bos_id, self.eos_id, vocab_size)
        self.vocab_size = self.n_pieces if vocab_size is None else vocab_size
        self._read_pieces()
        self._check_pieces()

    def _read_pieces(self) -> None:
        """Tabulate what each id adds to a text."""
        ids = list(range(self.n_pieces))
        p = self._processor
        try:
            spelled = p.id_to_piece(ids)
            unknown = {i: p.decode([i]) for i in compress(ids, p.is_unknown(ids))}
        except UnicodeDecodeError as error:
            raise ModelError(_malformed(self.path, "a piece that is not UTF-8")) from error
        self.control_ids = frozenset(compress(ids, p.is_control(ids)))
        for i in sorted(self.control_ids):
            _check_control(self.path, i, spelled[i])
        pieces = [piece.replace(SPACE, " ").encode("utf-8") for piece in spelled]
        for i in compress(ids, p.is_byte(ids)):
            pieces[i] = bytes([int(spelled[i][3:5], 16)])
        for i in self.control_ids:
            pieces[i] = b""
        for i, surface in unknown.items():
            pieces[i] = surface.encode("utf-8")
        self.pieces = tuple(pieces) + (b"",) * (self.vocab_size - self.n_pieces)
        """What each id adds inside a text."""
        self.breaks = self.control_ids.union(range(self.n_pieces, self.vocab_size))
        self.whole_replacement = False
        self._names = {spelled[i]: i for i in sorted(self.control_ids, reverse=True)}
        self._read_spaces([i for i in ids if spelled[i].startswith(SPACE) and i not in unknown])

    @cached_property
    def _inside(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the space in front of a text: of a field that stands twice, the last one counts."""
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self._processor.serialized_model_proto() + NO_SPACE_IN_FRONT)
        return processor

    def _read_spaces(self, spaced: list[int]) -> None:
        """Note which pieces lose their first space at the start of a text: spaced, those with one, or none.

        The file says whether encoding puts a space in front of a text; decoding one piece shows what it says.
        """
        p = self._processor
        strips = bool(spaced) and p.decode(spaced[:1]).encode("utf-8") != self.pieces[spaced[0]]
        self._spaced = frozenset(spaced) if strips else frozenset()
        lone = p.piece_to_id(SPACE)
        self._strips_every_space = lone in self._spaced and p.decode([lone, lone]) == ""

    def _check_pieces(self) -> None:
        """Hold the table against SentencePiece's own decoding of all pieces."""
        ids = list(range(self.n_pieces))
        if self.decode(ids) != self._processor.decode(ids):
            raise ModelError(
                f"{self.path.name}: it rewrites text when it decodes (a denormalizer), which is not supported; "
                f"one that does not is needed. Use the tokenizer.model that came with a LLaMA 2 checkpoint."
            )

    def encode(
        self, text: str, bos: bool | None = None, eos: bool | None = None, start: bool = True, inside: bool = False
    ) -> list[int]:
        """The ids of a text, with BOS in front and EOS behind as asked: see Tokenizer.encode.

        A text gets its space in front wherever it stands but inside, as in the reference: start changes nothing. The
        time grows with the length alone, also where there are no spaces.
        """
        check_text(text)
        check_around(bos, eos)
        ids: list[int] = (self._inside if inside else self._processor).encode(text)
        if not self.control_ids.isdisjoint(ids):
            raise UsageError(
                "SentencePiece reads a control token in this text, and text never becomes one; "
                "sentencepiece 0.2.2 or newer and an unchanged tokenizer.model are needed, or pass ids."
            )
        before = [self.bos_id] if (self.add_bos if bos is None else bos) else []
        after = [self.eos_id] if (self.add_eos if eos is None else eos) else []
        return [*before, *ids, *after]

    def spelling(self, token: int) -> str:
        """How the file spells the piece of an id below n_pieces, a control piece's name included."""
        spelled: str = self._processor.id_to_piece(token)
        return spelled

    def special(self, name: str) -> int:
        """The id of a control piece by its name. Raises UsageError for a name that is none."""
        return special_id(self._names, name)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, as SentencePiece defines it.

        The space that encoding puts in front of a text is taken away again; consecutive byte pieces are UTF-8, each
        byte that is not becomes U+FFFD; control ids and padding ids give nothing, but end a run of bytes. Raises
        UsageError for ids out of range.
        """
        return decoding.decode(self, ids)

    def piece(self, token: int) -> bytes:
        """What an id adds inside a text. Raises UsageError for an id out of range."""
        try:
            if token >= 0:
                return self.pieces[token]
        except (IndexError, TypeError):
            pass
        raise out_of_range(token, self.vocab_size)

    def first_piece(self, token: int) -> tuple[bytes, bool]:
        """What a valid id adds at the very start of a text, and whether the next id is still at the start."""
        piece = self.pieces[token]
        if token in self.breaks:
            return piece, True
        if token not in self._spaced:
            return piece, False
        return piece[1:], self._strips_every_space and piece == b" "


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a tokenizer file in full, refusing what is not a regular file of reasonable size before reading it."""
    try:
        file = open_regular(path)
        if file is None:
            raise ModelError(_malformed(path, "no regular file"))
        with file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= MAX_FILE_BYTES:
                raise ModelError(_malformed(path, f"a size of {size} bytes (1 to {MAX_FILE_BYTES} are read)"))
            data = read_up_to(file, MAX_FILE_BYTES)
    except OSError as error:
        raise ModelError(
            f"{path.name}: cannot read {quote(str(path))} ({error.strerror}); a SentencePiece model is needed. "
            f"Put the one that came with the checkpoint there."
        ) from error
    if what := signatures.named(data[: signatures.HEAD]) or signatures.other_tokenizer(data[: signatures.HEAD]):
        raise ModelError(_malformed(path, what))
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except (RuntimeError, UnicodeDecodeError) as error:  # the second where the message quotes a piece that is not UTF-8
        line = signatures.plain_text(data[: signatures.HEAD])
        found = f"a text that begins with {quote(line)}" if line else "what SentencePiece does not accept"
        raise ModelError(_malformed(path, found)) from error
    return processor


def _check_ids(path: Path, n_pieces: int, bos_id: int, eos_id: int, vocab_size: int | None) -> None:
    """Refuse a vocabulary without BOS or EOS, beyond the limit, or larger than the model's."""
    if not 0 < n_pieces <= MAX_PIECES:
        raise ModelError(_malformed(path, f"{n_pieces} pieces (1 to {MAX_PIECES} are read)"))
    if not (0 <= bos_id < n_pieces and 0 <= eos_id < n_pieces):
        raise ModelError(_malformed(path, f"no control pieces for begin and end of text (ids {bos_id} and {eos_id})"))
    if vocab_size is not None and vocab_size < n_pieces:
        raise ModelError(
            f"{path.name}: the tokenizer has {n_pieces} pieces, but the model only {vocab_size} ids: they do not "
            f"belong together. Use the tokenizer.model that came with the checkpoint."
        )


def _check_control(path: Path, token: int, piece: str) -> None:
    """Refuse a control piece that text could become: in SentencePiece 0.2.2, one character, or with spaces a word."""
    if len(piece) == 1 or SPACE in piece:
        raise ModelError(
            f"{path.name}: the control piece {quote(piece)} (id {token}) is spelled like text, which must never become "
            f"a control id; several characters without spaces are needed, as in '<s>'. Use the checkpoint's own file."
        )


def _malformed(path: Path, found: str) -> str:
    """The message for a file that is no usable tokenizer."""
    return (
        f"{path.name}: found {found}; a SentencePiece tokenizer.model with <s> and </s> as control pieces is needed. "
        f"Download the file again, or use the one that came with the checkpoint."
    )
