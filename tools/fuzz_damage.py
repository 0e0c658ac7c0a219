"""How tools/fuzz_inputs.py damages files: the bytes of one, changed in one to four places."""

from __future__ import annotations

import random
import re

NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    -(2**63),
)
TOKENS = (
    *(
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "0.0",
        "-0.5",
        "1e-30",
        "1e999",
        "NaN",
        "-Infinity",
        "true",
        "false",
        "null",
        "[]",
    ),
    *(
        "{}",
        '""',
        '"x"',
        '"../x"',
        '"/dev/zero"',
        '"\\ud800"',
        '"a\\u0000b"',
        "9" * 18,
        "9" * 40,
        "9" * 5000,
        "1" + "0" * 15,
    ),
    *("[" * 2000, '{"a":' * 500, "[1,2,3]", '{"rope_type":"linear","factor":2.0}', "65536", "1048576"),
)
OPCODES = (
    b"\x80cRbQqrhj(t)\x85\x86\x87]ae}suXJKM\x8aGN\x88\x89.0123456789PipoldFILSTUV\x81\x82\x8b\x8c\x8e\x93\x94\x95\x98"
)


def damage(data: bytes, rng: random.Random, text: bool) -> bytes:
    """One damaged copy: one to four changes, most of them where the structure lies (the ends of the file)."""
    changes = [_change_token, _swap_lines] if text and rng.random() < 0.7 else [_flip, _number, _cut, _copy, _opcode]
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(changes)(out, rng)
    return bytes(out)


def _place(out: bytearray, rng: random.Random) -> int:
    size = len(out)
    if size < 2:
        return 0
    zone = rng.random()
    if zone < 0.5:
        return rng.randrange(min(size, 6000))
    if zone < 0.8:
        return size - 1 - rng.randrange(min(size, 4000))
    return rng.randrange(size)


def _flip(out: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if out:
            out[_place(out, rng)] ^= 1 << rng.randrange(8)


def _number(out: bytearray, rng: random.Random) -> None:
    at, width = _place(out, rng), rng.choice((1, 2, 4, 8))
    value = rng.choice(NUMBERS) % (1 << 8 * width)
    out[at : at + width] = value.to_bytes(width, "little")


def _cut(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    if rng.random() < 0.5:
        del out[at:]
    else:
        del out[at : at + rng.choice((1, 2, 8, 64, 1000))]


def _copy(out: bytearray, rng: random.Random) -> None:
    source, at = _place(out, rng), _place(out, rng)
    piece = out[source : source + rng.choice((1, 4, 16, 46, 200, 4000))]
    if rng.random() < 0.5:
        out[at:at] = piece
    else:
        out[at : at + len(piece)] = piece


def _opcode(out: bytearray, rng: random.Random) -> None:
    if out:
        out[_place(out, rng)] = rng.choice(OPCODES)


def _change_token(out: bytearray, rng: random.Random) -> None:
    tokens = list(re.finditer(rb'"[^"]*"|-?\d[\d.eE+-]*|true|false|null', bytes(out)))
    if tokens:
        found = rng.choice(tokens)
        out[found.start() : found.end()] = rng.choice(TOKENS).encode()


def _swap_lines(out: bytearray, rng: random.Random) -> None:
    parts = bytes(out).split(b",")
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    if rng.random() < 0.5:
        parts[i] = parts[j]
    else:
        del parts[i]
    out[:] = b",".join(parts)
