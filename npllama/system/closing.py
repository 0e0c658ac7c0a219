"""What is closed at the end of a block."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T", bound="Closing")


class Closing:
    """A context manager whose end closes it. A subclass says what `close` does."""

    def close(self) -> None:
        """Let go of everything; closing twice is fine."""
        raise NotImplementedError

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
