"""From logits to text.

sampling.py    from logits to the next id
streaming.py   stop strings in a text that comes in pieces
"""
