"""Data: from files to batches. No model, no optimizer and no loop is known here.

config                                   the record that describes the text of a run
sources, unpack, documents               from files to named documents and their splits
vocabulary, byte_pairs, tokenizer        from text to token ids and back
windows, workers                         from token ids to batches, read ahead of their use
text                                     all of it together
"""

from race_jax.extras import require

require("race_jax.data", "train", {"absl": "absl-py", "grain": "grain"})
