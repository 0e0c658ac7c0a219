"""Text of a given form: one of some choices, what a regular expression or a grammar says, JSON by a schema.

Such a text is always whole: beside it a closing is kept, ids that complete it within the tokens that are left. What
would leave none is not taken.

Files, in the order in which to read them:

    vocabulary.py  which bytes each id writes, and the fewest ids that write a text
    matcher.py     what knows which ids may come next
    choices.py     the matcher of some given texts
    closing.py     how a text can be completed, searched for
    grammar.py     the matcher of llguidance: regular expressions, JSON Schema, Lark grammars
    schema.py      JSON Schemas: of Python's types, and the shortest JSON that fits one
    structures.py  what a call asks for, checked, and made into a matcher
    constraint.py  one text under way: what may come, and the closing that is kept
"""
