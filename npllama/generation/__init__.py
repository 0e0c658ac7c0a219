"""From logits to text, for many texts at once.

Files, in the order in which to read them:

    requests.py     the options of one call, checked
    results.py      what comes back: pieces, and the result
    chunks.py       how a long prompt is cut into calls, and what calls cost
    sampling/       from logits to the next id
    streaming.py    stop strings in a text that comes in pieces
    structured/     text of a given form: choices, regular expressions, JSON by a schema, grammars
    pool.py         who has which blocks of the cache: sharing, forks, beginnings that are found again
    speculation.py  guesses for the next ids of a text, from the text itself
    jobs.py         ids that go through the model, and who takes the logits
    completion.py   one continuation of one prompt
    scoring/        how likely texts are; options compared; embeddings
    batching.py     which jobs a step feeds, in which blocks, and who gets the logits
    scheduler.py    who runs the steps: callers in turn, or a thread
    sessions/       texts that go on over several calls, and on disk
    runtime.py      the pool and the scheduler of an open model
    handles.py      generations under way, as their owners hold them: streams, handles
"""
