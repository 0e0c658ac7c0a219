"""Text to ids and back: tokenizers behind one protocol.

Files, in the order in which to read them:

    protocol.py       what a tokenizer is, whatever kind of file it comes from
    decoding.py       ids into text, all at once or one at a time
    sentencepiece.py  the tokenizer of LLaMA 2, by the package sentencepiece
    vocabulary.py     a byte pair vocabulary as data: between the files it is read from and the tokenizer
    derived.py        the same as files of a model directory
    bpe/              the tokenizer of such a vocabulary
    readers/          the files of other programs that hold one

A new tokenizer is a class in a file of its own here, with the members of `protocol.Tokenizer`, and a line in
`store/tokenizers.KINDS`, which names its files in a model directory and opens it. `store/find_tokenizer.find_tokenizer`
tells its file from others by the content. A new file format of byte pair vocabularies is a reader that gives a
`vocabulary.Vocabulary`. What generates text asks for nothing else.
"""
