"""RACE attention in plain XLA, from hash projections and values to outputs, sums and gradients.

sweep    cuts a sequence into blocks and chunks, and walks over them in a loop
chunk    the mathematics of one chunk, forward and backward
prefix   the sums that enter every block, by an associative scan over the blocks' own sums
causal, bidirectional   the two forms of attention, forward and backward
rescan   rare forms, by one rematerialised scan: bucket normalisation, packed bidirectional
"""
