"""What the machine offers: how many threads are worth it."""

from __future__ import annotations

import pytest

from npllama.system import machine


@pytest.mark.parametrize(("quota", "threads"), [(7.65, 7), (7.0, 7), (1.99, 1), (0.5, 1), (float("inf"), 16)])
def test_a_quota_of_cpu_time_gives_whole_threads_rounded_down(
    quota: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight threads on 7.65 processors the system stops one in turn, and the others wait for it."""
    monkeypatch.setattr(machine, "physical_cores", lambda: 16)
    monkeypatch.setattr(machine, "affinity", lambda: 16)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.default_threads()[0] == threads
