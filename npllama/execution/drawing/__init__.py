"""From logits to ids, as far as an execution of its own pays.

Files, in the order in which to read them:

    top_k.py   the largest logits, in NumPy
    plan.py    what compiled code has to know to draw the ids of several steps in one call
"""
