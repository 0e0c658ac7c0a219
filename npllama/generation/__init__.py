"""From logits to text.

chunks.py      how a long prompt is cut into calls
requests.py    the options of one call, checked
sampling.py    from logits to the next id
streaming.py   from ids to text, as they come; stop strings
"""
