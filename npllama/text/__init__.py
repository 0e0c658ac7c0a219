"""Text to ids and back.

sentencepiece.py   the tokenizer of LLaMA 2, by the package sentencepiece
"""
