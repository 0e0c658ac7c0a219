"""What the machine offers: how many threads are worth it."""

from __future__ import annotations

from pathlib import Path

import pytest

from npllama.system import machine


@pytest.mark.parametrize(("quota", "threads"), [(7.65, 7), (7.0, 7), (1.99, 1), (0.5, 1), (float("inf"), 16)])
def test_a_quota_of_cpu_time_gives_whole_threads_rounded_down(
    quota: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight threads on 7.65 processors the system stops one in turn, and the others wait for it."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "physical_cores", lambda: 16)
    monkeypatch.setattr(machine, "affinity", lambda: 16)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.default_threads()[0] == threads


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("765000 100000\n", 7.65),
        ("max 100000", float("inf")),
        *((text, float("inf")) for text in ("", "765000", "a b", "765000 0", "nan 1")),
    ],
)
def test_the_quota_is_read_from_the_control_group_and_is_none_where_that_is_no_quota(
    text: str, quota: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(machine, "_cgroup_folders", lambda controller: [tmp_path])
    assert machine.cpu_quota() == quota
