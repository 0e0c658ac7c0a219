"""Is it right, and how fast?

verify.py        every op in NumPy against its kernel
quality.py       perplexity, and the KL divergence to a reference
bench.py         speed, memory, and the machine's bandwidth
random_model.py  models of real shapes with random weights
"""
