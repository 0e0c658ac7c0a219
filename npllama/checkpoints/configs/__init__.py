"""The config of a model in the words of others.

Files, in the order in which to read them:

    meta.py          params.json of Meta's releases, model_args of llama2.c
    hugging_face.py  config.json and generation_config.json
    rope_keys.py     scaled rotary positions, in the words of each kind of checkpoint
    family.py        what is of LLaMA's architecture; everything else is refused with its reason
"""
