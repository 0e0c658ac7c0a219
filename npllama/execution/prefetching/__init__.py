"""How far ahead of what they read kernels prefetch.

Files, in the order in which to read them:

    ahead.py   the numbers in memory that kernels read
    tuning.py  measures once on each machine which are best
"""
