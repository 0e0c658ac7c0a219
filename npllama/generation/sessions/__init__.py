"""A text that goes on over several calls, and on disk from one process to the next.

Files, in the order in which to read them:

    files.py     a saved session: which files, what they must be, a checksum for each block
    session.py   append, generate, rewind, fork, save: ids, and where their blocks rest meanwhile
"""
