"""Tokenizers behind one protocol.

protocol.py          what a tokenizer is
tokenizer.py         BpeTokenizer: byte pair encoding, read from any of the files below
  added.py             tokens cut out of a text before anything else
  splitting.py         pre-tokenizers: a text into words (unicode_classes.py: their tables)
  words.py             words into ids: symbols, merges, the cache of words
  bpe.py               the merging itself
decoding.py          ids into text, one at a time
vocabulary.py        a vocabulary as data, between those who read it and those who use it
  tokenizer_json.py    tokenizer.json (components.py: its parts; alphabet.py: how it spells bytes)
  tiktoken.py          Llama 3's own tokenizer.model
  gguf_vocabulary.py   the metadata of a GGUF file
  derived.py           the files of a model directory
"""

from npllama.text.derived import load, save
from npllama.text.gguf_vocabulary import read_gguf_vocabulary
from npllama.text.protocol import Tokenizer
from npllama.text.tiktoken import is_tiktoken, read_tiktoken
from npllama.text.tokenizer import BpeTokenizer
from npllama.text.tokenizer_json import read_tokenizer_json
from npllama.text.vocabulary import Vocabulary

__all__ = [
    "BpeTokenizer",
    "Tokenizer",
    "Vocabulary",
    "is_tiktoken",
    "load",
    "read_gguf_vocabulary",
    "read_tiktoken",
    "read_tokenizer_json",
    "save",
]
