"""Who has which blocks of the KV cache: sequences, what they share, and what is kept to be found again.

A block is in one of three states. Held: sequences have it in their tables (a count says how many). Kept: no sequence
has it, but it is known what it holds, so that a text which begins the same way finds it again; the one not used for
longest goes first. Free: nobody knows what it holds.

What a block holds is named by a hash over all ids up to its end, and over all else that keys and values depend on. So
an equal name means equal numbers, and equal beginnings of texts are kept once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence as Ids

import numpy as np

from npllama import cache as kv
from npllama.cache import BLOCK_SLOTS, NO_BLOCK, KVCache, n_blocks
from npllama.errors import UsageError
from npllama.execution.engine import Engine

Name = bytes


class PoolFullError(UsageError):
    """No block is free: some sequence has to give its blocks back first."""


class Pool:
    """The blocks of one engine's cache. Not for several threads at once: the scheduler's lock guards it.

    capacity: blocks in all; identity: names all that keys and values depend on beside ids, window and sinks
    (runtime._facts).
    """

    def __init__(self, engine: Engine, capacity: int, identity: bytes) -> None:
        self.capacity = capacity
        self.cache: KVCache = engine.new_pool(capacity, 1, 1)
        self._identity = identity
        self._free = deque(range(capacity))  # the lowest first: pages that were never written stay with the system
        self._holders = [0] * capacity
        self._names: dict[int, Name] = {}
        self._blocks: dict[Name, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # of the named blocks, those that no sequence holds
        self._rows = [0]  # rows of the tables that no sequence has

    @property
    def available(self) -> int:
        """Blocks that can be taken: the free and the kept ones."""
        return len(self._free) + len(self._kept)

    def take(self) -> int:
        """A block for one holder. Raises PoolFullError."""
        if self._free:
            block = self._free.popleft()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            raise PoolFullError(
                f"all {self.capacity} blocks of {BLOCK_SLOTS} positions are in use; wait, or close some."
            )
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more sequence has this block."""
        self._kept.pop(block, None)
        self._holders[block] += 1

    def give_back(self, block: int) -> None:
        """One sequence less has this block."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._names:
            self._kept[block] = None
        else:
            self._free.appendleft(block)

    def is_shared(self, block: int) -> bool:
        """Whether several sequences have this block."""
        return self._holders[block] > 1

    def name(self, block: int, name: Name) -> None:
        """Say what a block holds; the first block of a name is the one that is found."""
        if name not in self._blocks and block not in self._names:
            self._blocks[name], self._names[block] = block, name

    def find(self, name: Name) -> int:
        """The block that holds this, or NO_BLOCK."""
        return self._blocks.get(name, NO_BLOCK)

    def _forget(self, block: int) -> None:
        """What a block held is about to be overwritten."""
        name = self._names.pop(block, None)
        if name is not None:
            del self._blocks[name]

    def writable(self, block: int) -> int:
        """A block of the same contents that nobody else has, nor will find: the same one where it is so."""
        if not self.is_shared(block):
            self._forget(block)
            return block
        own = self.take()
        kv.copy_block(self.cache, block, own)
        self.give_back(block)
        return own

    def extend_names(self, names: list[Name], ids: Ids[int], n: int, window: int, n_sink: int) -> None:
        """Add to the names of a text's first blocks those of the other full blocks among its first n ids."""
        if len(names) == n // BLOCK_SLOTS:
            return
        last = names[-1] if names else hashlib.sha256(self._identity + b"%d %d" % (window, n_sink)).digest()
        for c in range(len(names), n // BLOCK_SLOTS):
            some = np.asarray(ids[c * BLOCK_SLOTS : (c + 1) * BLOCK_SLOTS], np.int64)
            last = hashlib.sha256(last + some.tobytes()).digest()
            names.append(last)

    def new_row(self, window: int, n_sink: int) -> int:
        """A row of the tables for a new sequence."""
        if not self._rows:
            n = len(self.cache.table)
            self._resize(2 * n, self.cache.table.shape[1])
            self._rows = list(range(n, 2 * n))
        row = self._rows.pop()
        self.cache.window[row], self.cache.n_sink[row], self.cache.length[row] = window, n_sink, 0
        return row

    def drop_row(self, row: int) -> None:
        """A sequence has ended."""
        self.cache.table[row], self.cache.length[row], self.cache.n_sink[row] = NO_BLOCK, 0, 0
        self._rows.append(row)

    def make_room(self, n_entries: int) -> None:
        """Make tables long enough for so many blocks."""
        n_rows, now = self.cache.table.shape
        if n_entries > now:
            self._resize(n_rows, max(n_entries, 2 * now))

    def _resize(self, n_rows: int, n_entries: int) -> None:
        old = self.cache
        n, c = old.table.shape
        table = np.full((n_rows, n_entries), NO_BLOCK, np.int32)
        table[:n, :c] = old.table
        more = {
            name: np.append(getattr(old, name), np.full(n_rows - n, value, np.int64))
            for name, value in (("window", kv.NO_WINDOW), ("n_sink", 0), ("length", 0))
        }
        self.cache = old._replace(table=table, **more)

    def check(self) -> None:
        """Raise UsageError unless every block is in exactly one state, and counted right: for tests and for doubt."""
        held = np.bincount(self.cache.table[self.cache.table >= 0], minlength=self.capacity)
        free, kept = set(self._free), set(self._kept)
        wrong = [
            b
            for b in range(self.capacity)
            if self._holders[b] != held[b] or [held[b] > 0, b in free, b in kept].count(True) != 1
        ] + [b for b in kept if b not in self._names]
        if wrong or len(free) != len(self._free) or len(self._names) != len(self._blocks):
            raise UsageError(f"the pool has lost count of {len(wrong)} blocks: {wrong[:8]}.")


def seen_blocks(p: int, window: int, n_sink: int) -> list[int]:
    """The blocks of the positions before p that a query at p sees."""
    first = max(0, p - window + 1) // BLOCK_SLOTS
    return [*range(min(n_blocks(n_sink), first)), *range(first, n_blocks(p) if window > 1 else first)]


class Sequence:
    """One text's blocks. `length` positions of it are written; the ids are kept by whoever feeds it."""

    def __init__(self, pool: Pool, window: int = kv.NO_WINDOW, n_sink: int = 0) -> None:
        self._pool = pool
        self.window, self.n_sink = window, n_sink
        self.row = pool.new_row(window, n_sink)
        self._names: list[Name] = []
        self._oldest = 0  # the first block behind the sinks' that was not given back
        self._ready = 0  # positions from the length up to here have blocks to write to
        self.closed = False

    @property
    def length(self) -> int:
        """Positions that are written."""
        return int(self._pool.cache.length[self.row])

    @property
    def _table(self) -> np.ndarray:
        row: np.ndarray = self._pool.cache.table[self.row]
        return row

    @property
    def n_held(self) -> int:
        """Blocks in the table."""
        return int((self._table >= 0).sum())

    def adopt(self, ids: Ids[int]) -> int:
        """Take over blocks that hold the beginning of a text, for an empty sequence: how many positions were found.

        The last id is never found: its logits are wanted.
        """
        names: list[Name] = []
        self._pool.extend_names(names, ids, len(ids) - 1, self.window, self.n_sink)
        found = [self._pool.find(name) for name in names]
        n = len(found)
        while n and NO_BLOCK in (found[c] for c in self._seen_from(n * BLOCK_SLOTS)):
            n -= 1
        seen = self._seen_from(n * BLOCK_SLOTS)
        self._pool.make_room(n)
        for c in seen:
            self._pool.hold(found[c])
            self._table[c] = found[c]
        self._pool.cache.length[self.row] = n * BLOCK_SLOTS
        self._names = names[:n]
        self._oldest = self._first_in_window(n * BLOCK_SLOTS)
        return n * BLOCK_SLOTS

    def _first_in_window(self, p: int) -> int:
        """The first block that a query at position p, or later, sees beside the sinks."""
        return max(0, p - self.window + 1) // BLOCK_SLOTS

    def _seen_from(self, p: int) -> list[int]:
        """The blocks of the positions before p that p sees."""
        return seen_blocks(p, self.window, self.n_sink)

    def holds(self, n: int) -> bool:
        """Whether the first n positions are written, and what position n sees of them was not given back."""
        return n <= self.length and NO_BLOCK not in (self._table[c] for c in self._seen_from(n))

    def claim(self, ids: Ids[int]) -> list[int]:
        """Take blocks for what stands behind a text sees, for an empty sequence: those that are to be filled.

        They are given as entries of the table; the others were found. `claimed` says that they are filled. Raises
        PoolFullError; what was taken until then stays.
        """
        self._pool.extend_names(self._names, ids, len(ids), self.window, self.n_sink)
        self._pool.make_room(n_blocks(len(ids)))
        missing = []
        for c in self._seen_from(len(ids)):
            block = self._pool.find(self._names[c]) if c < len(self._names) else NO_BLOCK
            if block == NO_BLOCK:
                missing.append(c)
                block = self._pool.take()
            else:
                self._pool.hold(block)
            self._table[c] = block
        return missing

    def claimed(self, n: int) -> None:
        """The blocks that `claim` took for a text of n ids hold its keys and values."""
        self._pool.cache.length[self.row] = n
        self._oldest = self._first_in_window(n)
        for c, name in enumerate(self._names):
            if self._table[c] != NO_BLOCK:
                self._pool.name(int(self._table[c]), name)

    def rows(self, c: int) -> list[np.ndarray]:
        """Entry c of the table: views (L, G, 64, ...) of each of the pool's arrays."""
        first = int(self._table[c]) * BLOCK_SLOTS
        return [a[:, :, first : first + BLOCK_SLOTS] for a in kv.arrays(self._pool.cache)]

    def reserve(self, n: int) -> None:
        """Have blocks of its own for the next n positions. Raises PoolFullError; what was taken until then stays."""
        start, pool = self.length, self._pool
        if start + n <= self._ready:
            return
        first, end = start // BLOCK_SLOTS, n_blocks(start + n)
        pool.make_room(end)
        del self._names[first:]
        for c in range(first, end):
            block = int(self._table[c])
            self._table[c] = pool.take() if block == NO_BLOCK else pool.writable(block)
        self._ready = end * BLOCK_SLOTS

    def needed(self, n: int) -> int:
        """Blocks that `reserve` would take for the next n positions."""
        start = self.length
        if start + n <= self._ready:
            return 0
        first, end = start // BLOCK_SLOTS, n_blocks(start + n)
        have = self._table[first : min(end, len(self._table))].tolist()
        return end - first - sum(b != NO_BLOCK and not self._pool.is_shared(b) for b in have)

    def written(self, ids: Ids[int]) -> None:
        """Name the full blocks of the text, whose ids are given; give back what no later query sees.

        What the last position sees stays too: it may be fed again, for its logits.
        """
        length, old = self.length, len(self._names)
        if length // BLOCK_SLOTS == old and length <= self.window:
            return
        self._pool.extend_names(self._names, ids, length, self.window, self.n_sink)
        for c in range(old, len(self._names)):
            self._pool.name(int(self._table[c]), self._names[c])
        first = self._first_in_window(length - 1)
        for c in range(max(self._oldest, n_blocks(self.n_sink)), first):
            self._pool.give_back(int(self._table[c]))
            self._table[c] = NO_BLOCK
        self._oldest = max(self._oldest, first)

    def rewind(self, n: int) -> None:
        """Go back to n positions. Raises UsageError where what position n sees has been given back."""
        if not 0 <= n <= self.length:
            raise UsageError(f"rewind to {n}: the sequence has {self.length} positions; it needs 0 to that many.")
        if NO_BLOCK in (self._table[c] for c in self._seen_from(n)):
            raise UsageError(
                f"rewind to {n}: positions that it sees have left the window of {self.window} and were given back; "
                f"begin anew."
            )
        keep, table = n_blocks(n), self._table
        for c in (keep + np.flatnonzero(table[keep:] != NO_BLOCK)).tolist():
            self._pool.give_back(int(table[c]))
            table[c] = NO_BLOCK
        self._ready = min(self._ready, keep * BLOCK_SLOTS) if n // BLOCK_SLOTS >= len(self._names) else 0
        del self._names[n // BLOCK_SLOTS :]
        self._pool.cache.length[self.row] = n
        self._oldest = min(self._oldest, self._first_in_window(n))

    def fork(self) -> Sequence:
        """Another sequence with the same text, and the same blocks until one of them writes."""
        self._ready = 0  # what both have is written by neither
        twin = Sequence(self._pool, self.window, self.n_sink)
        twin._names, twin._oldest = list(self._names), self._oldest
        twin._table[:] = self._table
        for block in self._table[self._table >= 0].tolist():
            self._pool.hold(block)
        self._pool.cache.length[twin.row] = self.length
        return twin

    def close(self) -> None:
        """Give all blocks back, the last ones first: beginnings are kept for longest. Closing twice is fine."""
        if self.closed:
            return
        self.closed = True
        for block in self._table[self._table >= 0].tolist()[::-1]:
            self._pool.give_back(block)
        self._pool.drop_row(self.row)
