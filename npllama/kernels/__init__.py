"""Numba implementations of the functions of ops.py."""
