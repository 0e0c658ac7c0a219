"""The operating system's side: memory and processors, interrupts, and files that may hold anything.

Files, in the order in which to read them:

    machine.py        processors, threads, memory, a private directory for compiled code
    regular_files.py  opening a regular file and nothing else
    signatures.py     what kind of file the first bytes show
    values.py         single values: a number in its range, or a message
    strict_json.py    JSON without surprises, in bounded work
    interrupts.py     Ctrl-C: put off, passed on, heard during compiled code
    closing.py        what is closed at the end of a block
"""
