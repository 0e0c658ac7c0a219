"""From logits to text.

chunks.py      how a long prompt is cut into calls
sampling.py    from logits to the next id
streaming.py   from ids to text, as they come; stop strings
"""
