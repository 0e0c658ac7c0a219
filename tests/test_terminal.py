"""What the commands show on a terminal while they wait."""

from __future__ import annotations

import io
import sys

import pytest

from npllama.commands.terminal import Notes, Wait


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_wait_is_announced_at_once_and_counted_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Notes() as notes:
        notes.add("compiling ...")
        notes.add("held until the command got somewhere")
        assert sys.stderr.getvalue() == "\rcompiling ... 0 s\n"
        notes.show()
    assert sys.stderr.getvalue() == "\rcompiling ... 0 s\nheld until the command got somewhere\n"


def test_a_wait_is_one_plain_line_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    wait = Wait("compiling ...")
    wait.end()
    assert sys.stderr.getvalue() == "compiling ...\n"
