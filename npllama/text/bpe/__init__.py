"""Byte pair encoding: from a vocabulary (text/vocabulary.py) to a tokenizer.

Files, in the order in which to read them:

    merging.py          the merging itself, and the cache of words
    unicode_classes.py  which characters are letters, numbers, white space (a table, written by a tool)
    splitting.py        pre-tokenizers: a text into words
    alphabet.py         how files spell bytes as characters
    added.py            tokens that are cut out of a text before anything else
    cuts.py             where a text without words may be cut
    words.py            words into ids: symbols, and what merging makes of them
    tokenizer.py        all of it together
"""
