"""Adapters for other packages. Each imports its package, and is imported by nothing here.

Files:

    lm_eval.py  a model for the evaluation harness lm-eval
"""
