"""RACE attention in plain XLA, from hash projections and values to outputs, sums and gradients.

sweep    cuts a sequence into blocks and chunks, and walks over them in a loop
chunk    the mathematics of one chunk, forward and backward
causal, bidirectional   the two forms of attention: steps over spans side by side, or one walk
rescan   rare forms, by one rematerialised scan: bucket normalisation, packed bidirectional
"""
