"""Adapters for other packages. Each imports its package, and is imported by nothing here.

Files, in the order in which to read them:

    harness.py  what an evaluation harness asks of a model
    lm_eval.py  a model for the evaluation harness lm-eval
"""
