"""A model directory: its manifest and arrays, how it is opened, and how it is made, whole or not at all.

npy.py             one array as a .npy file, mapped into memory
tokenizers.py      the kinds of tokenizers, the files of each
opening.py         a model directory, checked and mapped
text_rules.py      what the small files beside a Hugging Face checkpoint say about text and sampling
find_tokenizer.py  which tokenizer belongs to a checkpoint
staging.py         one rename makes a directory, or nothing is left
export.py          a checkpoint becomes a model directory
"""
