"""How likely texts are, and texts as vectors.

Files, in the order in which to read them:

    score.py  how probable continuations of a prompt are
    embed.py  texts as vectors
"""
