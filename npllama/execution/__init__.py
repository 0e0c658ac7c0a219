"""How model.forward is run: in NumPy, or compiled with a kernel in place of each op.

engine.py            chooses the execution; checks every batch before it computes
top_k.py             the largest logits, in NumPy
compiled.py          compiled execution of one model
compiled_code.py     files of compiled code: names, stamps, which of them go
compiled_sources.py  which sources machine code depends on
disk_cache.py        one compiled function in one file
threads.py           whose turn it is, forks, Numba's threads
affinity.py          threads on CPUs of their own beside other programs
process.py           what an open model changes in the process, and puts back
kernels/             Numba implementations of the functions of ops.py
"""
