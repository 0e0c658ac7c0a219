"""Text to ids and back: tokenizers behind one protocol.

Files, in the order in which to read them:

    protocol.py       what a tokenizer is, whatever kind of file it comes from
    decoding.py       ids into text, all at once or one at a time
    sentencepiece.py  the tokenizer of LLaMA 2, by the package sentencepiece
    vocabulary.py     a byte pair vocabulary as data: between the files it is read from and the tokenizer
    derived.py        the same as files of a model directory
    derived_names.py  the names of these files
    bpe/              the tokenizer of such a vocabulary
    readers/          the files of other programs that hold one
    chat/             messages to ids: the chat formats

A new tokenizer is a class with the members of `protocol.Tokenizer`; store/tokenizers.py has its kind in `KINDS`,
and how it is opened and stored; which file of a checkpoint is taken for it, store/find_tokenizer.py decides.
"""
