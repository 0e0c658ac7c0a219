"""How model.forward runs: in NumPy, or compiled with a kernel in place of each op.

Files, in the order in which to read them:

    engine.py            chooses the execution; checks every batch before it computes
    cache_checks.py      whether a cache is one for this model, and still holds what a position sees
    compiled.py          compiled execution of one model
    kernels/             the functions of ops.py, implemented for Numba
    threads.py           one call at a time; forks; how Numba's threads start
    abandon.py           a call of compiled code that another thread, or Ctrl-C, may end early
    prefetching/         how far ahead kernels prefetch: measured once on each machine
    affinity.py          threads on CPUs of their own while other programs compete for them
    process.py           what an open model changes in the process, and puts back
    compiled_code.py     files of compiled code: their names, and when they are removed
    compiled_sources.py  which sources machine code depends on
    disk_cache.py        one compiled function in one file, with its checksum
    drawing/             the largest logits in NumPy; what compiled code needs to draw ids
    rounding.py          the compiled search for scales, for export and quantize
"""
