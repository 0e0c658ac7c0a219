"""The operating system's side: memory and processors, and files that nobody vouches for.

machine.py      processors, memory, a private directory for compiled code
signatures.py   what kind of file the first bytes show
strict_json.py  JSON without surprises, in bounded work
"""
