"""Text to ids and back.

Files, in the order in which to read them:

    sentencepiece.py  the tokenizer of LLaMA 2, by the package sentencepiece

A new tokenizer is a class in a file of its own here, with the public members of `sentencepiece.Tokenizer`.
`inference.load` opens it; `find_tokenizer` and `_copy_tokenizer` of store/export.py take its file into a model
directory, `_check_tokenizer` of store/opening.py checks it there; `other_tokenizer` of system/signatures.py is what
refuses such files today.
"""
