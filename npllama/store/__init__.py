"""A model directory: its manifest and arrays, how it is opened, and how it is made, whole or not at all.

Files, in the order in which to read them:

    opening.py         a model directory, checked and mapped
    npy.py             one array as a .npy file, mapped into memory
    tokenizers.py      the kinds of tokenizers, the files of each
    export.py          a checkpoint, or another model directory, becomes a model directory
    plan.py            which number format each kind of weight gets
    find_tokenizer.py  which tokenizer belongs to a checkpoint
    text_rules.py      what the small files beside a Hugging Face checkpoint say about text and sampling
    staging.py         one rename makes a directory, or nothing is left
    direct.py          open a model directory, or a checkpoint by way of the folder of models
    model_cache.py     the folder of models that checkpoints were exported to by themselves: room, limit, removal
    sources.py         which files a checkpoint consists of, by names and times alone
    locks.py           files that processes lock
"""
