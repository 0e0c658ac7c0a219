"""Chat: messages to ids. Control tokens enter as ids, what people wrote as text.

Files, in the order in which to read them:

    messages.py     OpenAI's list of messages, checked
    formats.py      the chat formats: a table of parts for each
    marks.py        what a text must not hold: marks of a format that are plain text
    encoding.py     a format, a tokenizer and messages -> ids
    recognition.py  which format a chat template is, by its text, without running it

A new chat format is an entry of `formats.FORMATS`, and a rule in `recognition.RULES` where templates of it are about.
"""
