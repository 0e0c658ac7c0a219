"""Every step of ops.py compiled on its own, kept on disk: what one process of a run has compiled, all others load."""

from __future__ import annotations

from npllama.execution.disk_cache import kept_ops, open_caches


def refuse(message: str) -> None:
    """Whatever keeps code from being kept is an error in a test."""
    raise AssertionError(message)


OPS = kept_ops(open_caches(refuse))
