"""From logits to text.

Files, in the order in which to read them:

    requests.py   the options of one call, checked
    chunks.py     how a long prompt is cut into calls
    sampling.py   from logits to the next id; the order of the steps
    streaming.py  stop strings in a text that comes in pieces

A new way to sample is a field of `options.SamplingOptions` (with it the command line has an option), its step in
`sampling.candidates`, or in `sampling._truncated` where it leaves ids out, and a parameter of `Llama.generate` and
`Llama.stream` in inference.py. Model directories keep the options that a checkpoint suggests
(`store/text_rules.suggested_sampling`): a field that is written there needs a new format version (version.py).
"""
