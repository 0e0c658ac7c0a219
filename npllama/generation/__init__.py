"""From logits to text.

sampling.py    from logits to the next id
streaming.py   from ids to text, as they come; stop strings
"""
