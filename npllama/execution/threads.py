"""Threads: whose turn it is to compute, what a fork leaves, and how Numba's threads start.

A call holds a lock while it computes, and a fork waits until nobody does: so no child begins in the middle of a call,
or with a lock that nobody will release. Threads themselves do not survive a fork. NumPy's BLAS starts new ones; GNU's
OpenMP cannot, so Numba's are started as late as possible, by the first compiled call of a process.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from npllama.errors import UsageError, quote

# Rounds that an idle OpenMP thread spins before it sleeps, by the size of the model in bytes: short steps need a thread
# again at once, long ones lose more where other programs need its CPU.
SPIN_COUNTS = ((50_000_000, "20000"), (400_000_000, "4000"), (float("inf"), "1500"))
FORKED = (
    "this process was forked from one that had computed with compiled kernels, whose threads do not survive a fork; "
    'start workers with multiprocessing\'s "spawn", or use backend "numpy"'
)


class UnavailableError(UsageError):
    """Compiled execution cannot be had in this process or environment. NumPy can."""


# Locks, and forks.

INTERNALS = "npllama.execution.kernels.numba_internals"
"""The module that knows of Numba's threads; it is imported with numba, which is late."""

_forking = threading.RLock()
_fork_waits = False
_forked = False
_turns: weakref.WeakSet[Turn] = weakref.WeakSet()
_held: list[Turn] = []


class _Own(threading.local):
    turns = 0  # that this Python thread holds


_own = _Own()


class Turn:
    """A lock to hold while computing: no fork happens meanwhile, but by the thread that holds it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        with _forking:
            _turns.add(self)

    def __enter__(self) -> None:
        self.acquire()
        while _fork_waits and _own.turns == 1:  # let it go first: threads that compute on and on would keep it waiting
            self.release()
            with _forking:
                pass
            self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        self._lock.acquire()
        _own.turns += 1

    def release(self) -> None:
        _own.turns -= 1
        self._lock.release()


def _before_fork() -> None:
    global _fork_waits
    _forking.acquire()
    _fork_waits = True
    _held[:] = list(_turns)
    for turn in _held:
        turn.acquire()


def _after_fork() -> None:
    global _fork_waits
    for turn in reversed(_held):
        turn.release()
    _held.clear()
    _fork_waits = False
    _forking.release()


def _after_fork_in_child() -> None:
    global _forked
    internals = sys.modules.get(INTERNALS)
    _forked = _forked or (internals is not None and internals.threads_started())
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)

COMPILED = Turn()
"""One compiled call at a time in this process: each uses all its threads, and not every threading layer takes two."""
COMPILING = Turn()
"""One engine at a time compiles."""


# Numba.


def start_numba(report: Callable[[str], None]) -> None:
    """Import numba. Raises UnavailableError, with the reason, where it cannot compile or has no thread."""
    if _forked:
        raise UnavailableError(f"{FORKED}.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import numba

            from npllama.execution.kernels import numba_internals as internals

            internals.import_threads()
        except Exception as error:
            settings = " ".join(f"{k}={quote(v)}" for k, v in os.environ.items() if k.startswith("NUMBA_"))
            raise UnavailableError(
                f"numba cannot be imported ({quote(_first_line(error))}{'; set are ' if settings else ''}{settings}); "
                "mend that, or use backend numpy."
            ) from error
    for warning in caught:
        _pass_on(warning, report)
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined] # set when numba is imported
        raise UnavailableError("NUMBA_DISABLE_JIT is set, so nothing can be compiled; unset it, or use backend numpy.")
    if lacking := internals.lacking_features(str(numba.config.CPU_FEATURES or "")):  # type: ignore[attr-defined]
        raise UnavailableError(
            f"NUMBA_CPU_FEATURES asks for {quote(lacking)}, which this CPU has not or LLVM cannot read (+name,-name); "
            "leave it out, or use backend numpy."
        )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _pass_on(warning: warnings.WarningMessage, report: Callable[[str], None]) -> None:
    """Say in one line which setting Numba does not understand: it says it with a traceback."""
    text = str(warning.message)
    if text.startswith("Environment variable 'NUMBA_"):
        report(f"{text.split(chr(39))[1]} is not understood by numba, which uses its default")
    else:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def numba_threads_later(model_bytes: int = 0) -> Iterator[None]:
    """What is compiled or loaded inside finds Numba's threading layer; its threads start with the first call.

    The layer is loaded here, with OpenMP told how to wait. Raises UnavailableError for a layer that is not there.
    """
    from npllama.execution.kernels import numba_internals as internals

    before = internals.threads_started()
    try:
        with _spin_count(model_bytes):
            internals.launch_threads()
    except Exception as error:
        raise UnavailableError(
            f"numba has no threading layer ({quote(_first_line(error))}); see NUMBA_THREADING_LAYER, "
            "or use backend numpy."
        ) from error
    try:
        yield
    finally:
        internals.start_threads_again(before)  # in whichever process needs them


@contextmanager
def _spin_count(model_bytes: int) -> Iterator[None]:
    """Tell OpenMP how to wait, which it reads from the environment when it is loaded. A user's own setting wins."""
    if any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = next(rounds for size, rounds in SPIN_COUNTS if model_bytes < size)
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def numba_threads(asked: int | None, default: int) -> int:
    """How many threads compiled calls use. Raises UsageError for more than Numba was started with."""
    import numba

    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined] # set when numba is imported
    if asked is None:
        return min(default, most)
    if asked > most:
        raise UsageError(
            f"threads={asked} is more than the {most} that Numba was started with; "
            f"ask for fewer, or set NUMBA_NUM_THREADS before the start."
        )
    return asked


@contextmanager
def using(n_threads: int) -> Iterator[None]:
    """Let compiled calls of this Python thread use n threads, and then as many as before.

    Raises UsageError in a process that was forked from one whose threads had started.
    """
    before = use(n_threads)
    try:
        yield
    finally:
        put_back(before, n_threads)


def use(n_threads: int) -> int:
    """The beginning of `using`, for calls that are short: returns how many threads it was before."""
    if _forked:
        raise UsageError(f"{FORKED}.")
    import numba

    before: int = numba.get_num_threads()
    if before != n_threads:
        numba.set_num_threads(n_threads)
    return before


def put_back(before: int, n_threads: int) -> None:
    """The end of `using`."""
    if before != n_threads:
        import numba

        numba.set_num_threads(before)


def survived() -> bool:
    """Whether this process can use compiled code: it was not forked from one whose threads had started."""
    return not _forked
