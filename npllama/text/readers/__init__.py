"""Byte pair vocabularies in the files of other programs.

Files, in the order in which to read them:

    components.py       the parts of a tokenizer.json that are known
    tokenizer_json.py   tokenizer.json of Hugging Face
    tiktoken.py         tokenizer.model of Llama 3
    gguf_vocabulary.py  the metadata of a GGUF file
"""
