"""Is it right, and how fast?

Files, in the order in which to read them:

    verify.py            every op in NumPy against its kernel
    quality.py           perplexity, and the KL divergence to a reference
    bench.py             speed, memory, and the machine's bandwidth
    random_model.py      models of real shapes with random weights
    checkpoint_facts.py  what a checkpoint is and takes, before any export
"""
