"""Numba implementations of the functions of ops.py, which compiled execution puts in their place.

The path of one product, q = wq x in q4, from ops.linear to the instruction:

    model.attention calls ops.linears        compile.py compiles model.forward, where linear.py overloads it
    linear.py      the type Q4 selects       formats.py the kernels that q4.py has registered
    fused_inputs   wq, wk, wv together       three matrices share x, and one parallel loop
    int8_input     x is rounded to 8 bits    activations.quantize_rows, in the order of the tiles
    int8_linear    threads take blocks       16 rows of w; a tile is a block times 8 tokens, or times 1
    q4.py          a group of a tile         64 bytes of codes -> levels, looked up in the codebook
    int8_dot       the dot product           llvm.x86.avx512.vpdpbusd, or what this CPU has instead

The same bits come out for any number of threads: a thread owns whole outputs, whose order of addition depends on shapes
alone; nothing is summed over threads, and no flag lets the compiler reorder (flags.py).

Files, in the order in which to read them:

    linear.py           ops.linear, ops.linears, ops.embed: the number format selects the kernel
    formats.py          the kernels of every number format, found by the type of a weight
    fused_inputs.py     several matrices that multiply the same input
    float_linear.py     float32, float16, bfloat16: few tokens (GEMV), many tokens (GEMM)
    gemv_f32.py         dot products of one row of x with some rows of w
    gemm_f32.py         the register tile of many tokens, and transposing
    int8_linear.py      grouped formats: tiles, strips of blocks, threads
    int8_input.py       the input rounded to 8 bits
    q4.py               the kernel of q4
    q6.py               the kernel of q6
    q8.py               the kernel of q8
    int8_dot.py         vector operations on 8-bit codes, in the form that this CPU has
    amx.py              the same products by Intel's AMX
    attention.py        ops.attend: online softmax over blocks of the KV cache
    weighted_sum.py     its two products, in float64
    kv_formats.py       keys and values in float32, float16 and 8 bits
    elementwise.py      RMSNorm, RoPE, SwiGLU
    top_k.py            the largest logits, for sampling
    simd.py             vector operations on float32 and float64
    ir_math.py          multiply-add, conversions and exp in LLVM IR
    llvm.py             pointers, vectors and calls in LLVM IR
    target.py           the CPU that is compiled for
    flags.py            compiler flags, and the switch for plain kernels
    compile.py          model.forward compiled whole, and kept on disk
    numba_internals.py  what is used of Numba's private parts, each probed, with one fallback
    affinity.py         ties threads to CPUs
    per_op.py           every op compiled on its own
    bandwidth.py        reads memory as fast as possible
"""
