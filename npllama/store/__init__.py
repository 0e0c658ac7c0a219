"""A model directory: its manifest and arrays, how it is opened, and how it is made, whole or not at all.

npy.py          one array as a .npy file, mapped into memory
opening.py      a model directory, checked and mapped
text_rules.py   what the small files beside a Hugging Face checkpoint say about text and sampling
staging.py      one rename makes a directory, or nothing is left
export.py       a checkpoint becomes a model directory
sources.py      which files a checkpoint consists of, by names and times alone
locks.py        files that processes lock
model_cache.py  the folder of models that checkpoints were exported to by themselves: room, limit, removal
direct.py       open a model directory, or a checkpoint by way of that folder
"""
