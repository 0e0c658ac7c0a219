"""SentencePiece models for tests: trained ones, and ones written piece by piece to be odd.

The file is a protobuf message with the fields of sentencepiece_model.proto: pieces 1 {piece 1, score 2, type 3},
trainer_spec 2 {model_type 3, byte_fallback 35}, normalizer_spec 3 {add_dummy_prefix 3, remove_extra_whitespaces 4}.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Sequence

import sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
USUAL = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]


def trained(**options: object) -> bytes:
    """A BPE model of about 400 pieces with byte fallback, trained as LLaMA 2's was, on seeded nonsense."""
    rng = random.Random(1)
    words = ["".join(rng.choices("aeionrst", k=rng.randint(1, 6))) for _ in range(60)]
    words += ["Ä", "naïve", "漢字", ",", "  "]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(120)]
    file = io.BytesIO()
    usual = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **{**usual, **options})
    return file.getvalue()


def written(pieces: Sequence[tuple[str | bytes, int]], byte_fallback: bool = True) -> bytes:
    """A BPE model of just these (piece, type), the earlier merged first."""
    message = b"".join(_piece(piece, kind, -i) for i, (piece, kind) in enumerate(pieces))
    trainer = b"\x18\x02" + (b"\x98\x02\x01" if byte_fallback else b"")
    return message + _field(2, trainer) + _field(3, b"\x18\x01\x20\x00")


def control_pieces(names: Sequence[str]) -> bytes:
    """Control pieces to be appended to the file of a model."""
    return b"".join(_piece(name, CONTROL, 0) for name in names)


def _piece(piece: str | bytes, kind: int, score: float) -> bytes:
    text = piece.encode() if isinstance(piece, str) else piece
    return _field(1, _field(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])
