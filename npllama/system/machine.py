"""What this machine offers: processors, memory, a private directory for compiled code."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from pathlib import Path

# glibc's numbers of two settings (malloc.h), and their values: the largest that it accepts, and enough for all steps.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_KEPT_BLOCK_BYTES, MAX_KEPT_BYTES = 32 << 20, 128 << 20


def affinity() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Cores among the processors that this process may use, SMT siblings counted once; all of them where unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return affinity()
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((topology / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def cache_bytes() -> list[int]:
    """Sizes of a processor's caches for data, the one nearest to memory last; nothing where the system does not say."""
    found: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "type").read_text().strip() != "Instruction":
                size = (index / "size").read_text().strip()  # in KiB: 32768K
                found[int((index / "level").read_text())] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return [size for _, size in sorted(found.items())]


def cpu_quota() -> float:
    """Processors' worth of time that the container may use (cgroup cpu.max or cfs quota); infinity without a limit."""
    limits = [float("inf")]
    for folder in _cgroup_folders("cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()[:2]
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if quota not in ("max", "-1"):
                limits.append(float(quota) / float(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(limits)


def default_threads() -> tuple[int, str]:
    """How many threads to use, and why: OMP_NUM_THREADS, cores, affinity or the container's quota: whichever is least.

    Of a quota whole threads: of eight threads on 7.65 processors one is stopped in turn, and the others wait for it.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for nested loops
    found = [
        *([(int(asked), "OMP_NUM_THREADS")] if asked.isascii() and asked.isdigit() and int(asked) else []),
        (physical_cores(), "physical cores"),
        (affinity(), "processor affinity"),
        (max(1, int(min(cpu_quota(), 1 << 20))), "the container's CPU quota"),
    ]
    return min(found, key=lambda choice: choice[0])


def free_memory() -> int:
    """Bytes that can be taken without swapping, the container's limit included; a large number where unknown."""
    found = [1 << 62]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder in _cgroup_folders("memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                text = (folder / limit).read_text().strip()
                if text != "max":
                    found.append(max(0, int(text) - int((folder / usage).read_text()) + _file_cache(folder)))
            except (OSError, ValueError):
                continue
    return min(found)


def _file_cache(folder: Path) -> int:
    """Bytes of a cgroup's usage that are file pages, which the system takes back when memory is short."""
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(("inactive_file ", "total_inactive_file ")):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _cgroup_folders(controller: str) -> list[Path]:
    """Folders of the control groups (version 2 or 1) of this process, from its own up to the root."""
    root = Path("/sys/fs/cgroup")
    folders = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root
        elif controller in controllers.split(","):
            base = root / controllers if (root / controllers).is_dir() else root / controller
        else:
            continue
        folder = base / path.lstrip("/")
        folders += [f for f in (folder, *folder.parents) if f == base or base in f.parents]
    return folders


def compiled_code_directory(make: bool = True) -> tuple[Path | None, str]:
    """The private directory for compiled code, made when missing (if `make`); None and the reason where there is none.

    NPLLAMA_CACHE_DIR, else npllama under XDG_CACHE_HOME, else under ~/.cache. Refused unless this user owns it and no
    one else can write to it: its files are code.
    """
    try:
        if os.environ.get("NPLLAMA_CACHE_DIR"):
            folder = Path(os.environ["NPLLAMA_CACHE_DIR"])
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npllama"
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022):
            return None, f"{folder} can be written by others (needed: your own directory, mode 0700)"
        if not os.access(folder, os.W_OK | os.X_OK):
            return (folder, "") if os.access(folder, os.R_OK | os.X_OK) else (None, f"{folder} is not accessible")
    except (OSError, RuntimeError) as error:
        return None, f"no directory for compiled code: {error}; NPLLAMA_CACHE_DIR names another"
    return folder, ""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for the next call instead of giving their pages back; False where it is absent.

    Every step makes a new array of up to some megabytes, and taking its pages from the system anew costs more than
    the step's arithmetic. At most MAX_KEPT_BYTES stay that would have gone back. A user's own MALLOC_ settings win.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_KEPT_BLOCK_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, MAX_KEPT_BYTES))


def give_back_memory() -> None:
    """Tell glibc to give the system what is freed. Its thresholds stay: it tells nobody what they were."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_rss_mb() -> float:
    """Most memory that this process has had resident, mapped files included, in 10^6 bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
