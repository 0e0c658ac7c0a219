"""How likely texts are.

Files, in the order in which to read them:

    jobs.py   the probabilities of given ids, options compared, hidden states as embeddings
    calls.py  the calls of an open model that ask for it
"""
