"""Numba implementations of the functions of ops.py, which compiled execution puts in their place.

The path of one product, q = wq x in q4, from ops.linear to the instruction:

    compile.py       model.forward is compiled; model.attention calls ops.linears, which linear.py overloads
    linear.py        `_linears`: the type Q4 selects kernels
    formats.py       `kernels_of`: those that q4.py has registered
    fused_inputs.py  wq, wk and wv together: three matrices share x, and one parallel loop
    int8_input.py    x is rounded to 8 bits as activations.quantize_rows does, in the order of the tiles
    int8_linear.py   `make_linears`, `make_multiply_blocks`: threads take blocks, 16 rows of w; a tile is a block times
                     8 tokens, or 16, 4, 2, 1
    q4.py            `make_four_bits`, a group of a tile: 64 bytes of codes -> levels, looked up in the codebook
    int8_dot.py      `dot8`, `dot_small`: the dot product, llvm.x86.avx512.vpdpbusd, or what this CPU has instead

Why the bits of a result do not depend on the number of threads:

    1. A thread owns whole outputs: nothing is summed over threads.
    2. Each output is summed in one order, which follows from shapes and positions, not from who computes what.
    3. The compiler may not reorder, contract or approximate (flags.py), and ir_math.py spells out what it would choose.

Why they do not depend either on how a prompt is cut, nor on what is computed beside it:

    4. In quantized formats products of codes are integers, so their sums are exact in any order and by any instruction.
       Groups are added in ascending order, each operation rounded to float32: ops.linear in NumPy does the same. In
       f32, f16 and bf16 a sum has as many lanes as a vector register of this CPU, and one order for any number of
       tokens (float_tile.py): the same bits on every CPU with as wide registers and with fused multiply-add or without.
    5. Attention adds blocks of slots that begin at fixed slots, in float64; a masked slot adds an exact zero.
    6. Norms, rotations and SwiGLU compute each row alone.

tests/test_same_bits.py, tests/test_kernels_float.py and tests/test_conventions.py hold these.

Files, in the order in which to read them:

    linear.py           ops.linear, ops.linears, ops.embed: the number format selects the kernel
    formats.py          the kernels of every number format, found by the type of a weight
    fused_inputs.py     several matrices that multiply the same input
    float_linear.py     float32, float16, bfloat16: chunks of rows, strips of columns, threads
    float_tile.py       the tile of a few rows and tokens, and its order of addition
    strided_rows.py     rows of matrices by pointers, and transposing
    int8_linear.py      grouped formats: tiles, strips of blocks, threads
    int8_input.py       the input rounded to 8 bits
    q4.py               the kernel of q4
    q6.py               the kernel of q6
    q8.py               the kernel of q8
    ggml.py             the kernels of the formats of GGUF files: float16 scales, minimums
    int8_dot.py         vector operations on 8-bit codes, in the form that this CPU has
    int8_narrow.py      tiles of AVX2: four tokens, whose sums stay in registers, of half a group in 16 bits
    amx.py              the same products by Intel's AMX
    attention.py        ops.attend: online softmax over blocks of the KV cache
    weighted_sum.py     the two products of attention, in float64
    kv_formats.py       keys and values in float32, float16 and 8 bits
    elementwise.py      RMSNorm, RoPE, SwiGLU
    top_k.py            the largest logits, and the draw of an id from them
    planned.py          several steps in one call, each fed what was drawn in the one before
    simd.py             vector operations on float32 and float64
    ir_math.py          multiply-add, conversions and exp in LLVM IR
    llvm.py             pointers, vectors and calls in LLVM IR
    target.py           the CPU that is compiled for
    flags.py            compiler flags, and the switch for plain kernels
    compile.py          model.forward compiled whole, and kept on disk
    numba_internals.py  what is used of Numba's private parts, each probed, with one fallback
    affinity.py         ties threads to CPUs
    abandon.py          the flag that ends a call early
    prefetch.py         prefetching as far ahead as numbers in memory say
    per_op.py           every op compiled on its own
    bandwidth.py        reads memory as fast as possible
    rounding.py         the search for scales when weights are rounded

A new step of the model is a function of ops.py, its overload here (elementwise.py has the shortest), an entry of
`per_op.OPS` and of `TOLERANCE` in measure/verify.py; then model.py calls it.
"""
