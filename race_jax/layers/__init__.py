"""Attention layers for Flax, with one file for each, and the parts that they share.

registry                    the attentions that a model can be built with, by name
race_config, functional     the RACE layer as a checked record and a pure function
race, race_linen            its two Flax modules, NNX and Linen
hash_options, planes        what all attentions share that hash queries and keys
parts, gates, short_conv    parts that every layer may take
self_attention, positions   what the other attentions share
softmax, linear, ...        the other attentions
attention_fn                RACE as a replacement for Flax's own attention function
"""
