"""From logits to the next id.

Files, in the order in which to read them:

    basic.py     the basic options, fast, also with a few ids forbidden or shifted; the random numbers
    ahead.py     the draws of several ids before the first is known
    chain.py     every step of sampling, in any order
    logprobs.py  how probable the ids were, and what else might have come
    sampler.py   one text's sampling: which ids may come, and what is carried from one to the next

A new way to sample is a field of `options.SamplingOptions` (with it the command line has an option) and of
`options.MoreOptions`, and its step in `chain.STEPS` with its name in `options.SAMPLERS`. Model directories keep the
basic options that a checkpoint suggests (`store/text_rules.suggested_sampling`): a field that is written there needs a
new format version (version.py).
"""
