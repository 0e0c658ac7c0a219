"""Talk with a model.

Files, in the order in which to read them:

    line_editor.py  lines that a person types, or that come through a pipe
    chat.py         question and answer, and what begins with a slash
"""
