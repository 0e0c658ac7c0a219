"""Parts of the README that tools write: what stands between two markers."""

from __future__ import annotations

import sys
from pathlib import Path


def write_between(markers: tuple[str, str], path: Path, text: str) -> None:
    """Replace what stands between two markers of a file. Leaves with a line where the file has not both, once each."""
    begin, end = markers
    whole = path.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        sys.exit(f"{path}: needs one {begin} and one {end} behind it; nothing was written")
    path.write_text(f"{whole.partition(begin)[0]}{begin}\n{text}\n{end}{whole.partition(end)[2]}", encoding="utf-8")
