"""What a file is, by its first bytes, where it is not what its name says: a pointer, a web page, another format."""

from __future__ import annotations

import re
import struct

HEAD = 512
"""Bytes of the beginning that are looked at."""

CHECKPOINTS = (
    (b"PK\x03\x04", "zip", "a zip archive, as torch.save writes it"),
    (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e", "legacy", "a file of an old torch.save"),
    (b"GGUF", "gguf", "a GGUF file of llama.cpp"),
    (b"24ka", "llama2.c", "a file of weights for llama2.c"),
)
"""How checkpoints begin that are read, their format, and what they are where another kind of file is needed."""

MAGICS = (
    (b"tjgg", "a GGJT file of llama.cpp; give the checkpoint that it was made from"),
    (b"lmgg", "a GGML file of llama.cpp; give the checkpoint that it was made from"),
    (b"fmgg", "a GGMF file of llama.cpp; give the checkpoint that it was made from"),
    (b"\x93NUMPY", "a NumPy array; give a PyTorch or safetensors checkpoint"),
    (b"\x89HDF", "an HDF5 file; give a PyTorch or safetensors checkpoint"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"PK\x05\x06", "an empty zip archive; download the file again"),
)

POINTER = "a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`"
PAGE = "a web page; download the file itself"
TEXTS = (
    ("version https://git-lfs", POINTER),
    ("version https://hawser", POINTER),
    ("# xet version", "a Xet pointer, not the file itself; download the file itself"),
    *((f"<{tag}", PAGE) for tag in ("!doctype", "html", "head", "body", "script", "meta", "title", "?xml", "!--")),
)
"""How texts begin, in lower case, behind a byte order mark and blanks."""

_MERGES = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def checkpoint(head: bytes) -> str | None:
    """The format of a checkpoint that begins with `head`, where a magic number says it (not in safetensors files)."""
    return next((kind for magic, kind, _ in CHECKPOINTS if head.startswith(magic)), None)


def named(head: bytes) -> str | None:
    """What a file that begins with `head` is, and what to do about it; None for what is not known here."""
    for magic, what in (*((magic, what) for magic, _, what in CHECKPOINTS), *MAGICS):
        if head.startswith(magic):
            return what
    return pointer_or_page(head)


def pointer_or_page(head: bytes) -> str | None:
    """As `named`, for what may lie in the place of any file: what points to it, or the page of a server."""
    text = _text(head).lower()
    return next((what for start, what in TEXTS if text.startswith(start)), None)


def _text(head: bytes) -> str:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return head.decode("utf-16", "replace").lstrip()
    return head.removeprefix(b"\xef\xbb\xbf").decode("latin-1").lstrip()


def plain_text(head: bytes) -> str | None:
    """The first line of what is plain ASCII text, as an error page of a server may be; None for anything else."""
    text = head.decode("ascii", "replace").strip()
    printable = text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    return text.splitlines()[0] if len(text) >= 8 and printable and "\ufffd" not in text else None


def is_llama2c_run(head: bytes) -> bool:
    """Whether a file can be of version 0 of llama2.c's, which has no magic number: seven int32 that fit together.

    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: the output is not tied), seq_len. Source:
    llama2.c, export.py, version 0.
    """
    if len(head) < 28:
        return False
    dim, width, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", head[:28])
    if not (0 < layers <= 512 and 0 < kv_heads <= heads <= 1 << 10 and 0 < context <= 1 << 24):
        return False
    sizes = 0 < dim <= 1 << 16 and 0 < width <= 1 << 19 and 0 < abs(vocabulary) <= 1 << 20
    return sizes and dim % heads == 0 and heads % kv_heads == 0


def other_tokenizer(head: bytes) -> str | None:
    """What kind of tokenizer a file is that SentencePiece did not write; None for what is not known here."""
    if _text(head)[:1] == "{":
        return "JSON, as tokenizer.json of Hugging Face's tokenizers library is"
    if _MERGES.match(head):
        return "a list of tiktoken's, as LLaMA 3's tokenizer.model is"
    if len(head) >= 13:
        longest, _, length = struct.unpack("<IfI", head[:12])
        if 0 < length <= longest <= 1 << 12 and b"\0" in head[:4]:
            return "a tokenizer.bin of llama2.c"
    return None
