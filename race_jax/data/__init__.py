"""The data of a run, from files to batches. This package knows no model and no optimizer.

config                                   the record that describes the text of a run
sources, unpack, documents               from files to named documents and their splits
vocabulary, byte_pairs, tokenizer        from text to token ids and back
windows, workers                         from token ids to batches, which are read ahead of use
text                                     all of these steps together
"""

from race_jax.extras import require

require("race_jax.data", "train", {"absl": "absl-py", "grain": "grain"})
