"""Mosaic GPU kernels for Hopper (sm_90), and the parts that they share.

`run` runs the plans of backend "mosaic_gpu". A kernel is a file, or a folder whose `kernel` has the algorithm:

- `decode_attention`: attention of a few query tokens per sequence.
- `prefill_attention`: attention of more query tokens per sequence.
- `flat_matmul`: x @ w for 1 to 64 rows, on tensor cores.
- `gemv`: x @ w for one row, on CUDA cores.
- `fused_layer`: all matmuls from one attention to the next.

====================  ================  =================  ===========  ====  ===========
part                  decode_attention  prefill_attention  flat_matmul  gemv  fused_layer
====================  ================  =================  ===========  ====  ===========
parts.ring                   x                  x               x        x         x
parts.registers              x                  x                                  x
parts.handover               x                                  x
parts.accumulators                                              x                  x
parts.grid_sync                                                                    x
parts.overlap                x                                                     x
parts.cache_tiles            x                  x
parts.scores                 x                  x
====================  ================  =================  ===========  ====  ===========

- `ring`: the ring of TMA stages that a kernel streams through.
- `registers`: arrays as registers, and inline PTX of them. `handover`, `accumulators` and `grid_sync` use it, too.
- `handover`: partial sums from a helper to an owner, and its flags.
- `accumulators`: transposed products, to and from memory.
- `grid_sync`: CTAs of one launch wait for each other's results.
- `overlap`: a launch starts while its predecessor ends.
- `cache_tiles`: keys or values from a contiguous or a paged cache, and 8 bits made 16.
- `scores`: scores in base 2, and their cap.
"""
