"""RACE attention over hash projections in plain XLA.

Comes in: z_q, z_k, values, gate, masks, initial sums. Goes out: outputs, final sums, gradients.

    sweep    how a sequence is cut into blocks and chunks, and the loop that walks over them
    chunk    the mathematics of one chunk, forward and backward
    prefix   what enters every block: an associative scan over the sums of the blocks
    causal, bidirectional   the two forms, each forward and backward
    rescan   the rare forms, by one rematerialised scan: bucket normalisation, packed bidirectional
"""
