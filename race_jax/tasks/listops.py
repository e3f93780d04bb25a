"""ListOps: which digit does a long expression of nested lists come to?

The examples are drawn by the rules of the Long Range Arena, or read from files.
"""

import dataclasses

import numpy as np

from race_jax.data.examples import Examples
from race_jax.data.listops import VOCAB_SIZE, Trees, draw_examples, read_examples
from race_jax.data.sources import named_paths
from race_jax.records import at_least
from race_jax.tasks.classification import Classification, ClassificationConfig

SPLITS = ("train", "valid", "test")
CLASSES = tuple(map(str, range(10)))


@dataclasses.dataclass
class ListOpsConfig(ClassificationConfig):
    """ListOps. The defaults are those of the Long Range Arena.

    Attributes:
        pooling: what the head reads: "mean" is the mean over the tokens that are not padding, and
            "cls" is a learned token before the first one.
        num_buckets: the number of lengths that batches are padded to: config.data.sequence_length,
            half of it, a quarter, and so on. One program is compiled for each.
        train_examples: number of training examples that are drawn.
        valid_examples: number of validation examples that are drawn.
        test_examples: number of test examples that are drawn.
        max_depth: the depth of the deepest digits; the root has depth 1.
        longer_than: only expressions of more tokens than this are kept, and of fewer than
            config.data.sequence_length.
        data_seed: the seed of the examples. It is not that of the run, so that runs of several
            seeds have the same examples.
    """

    pooling: str = "cls"
    train_examples: int = 96_000
    valid_examples: int = 2000
    test_examples: int = 2000
    max_depth: int = 10
    longer_than: int = 500
    data_seed: int = 0

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        super().validate()
        for name in ("train_examples", "valid_examples", "test_examples"):
            at_least(name, getattr(self, name), 1)
        at_least("max_depth", self.max_depth, 2)
        at_least("longer_than", self.longer_than, 0)
        at_least("data_seed", self.data_seed, 0)


class ListOps(Classification):
    """ListOps, drawn from a seed, or read from files with `config.data.source="files"`.

    A line of a file has the label, a tab and the expression, or is as in LRA's own files.

    Source: Nangia and Bowman 2018; Tay et al. 2020, "Long Range Arena", section 2.2.1.
    """

    config_class = ListOpsConfig

    def __init__(self, config):
        if config.data.source == "files":
            splits, origin = _read(config.data), ", ".join(config.data.train_files)
            way_out = ""
        else:
            options = config.task_config()
            splits = _drawn(options, config.data.sequence_length)
            origin = f"drawn from the seed {options.data_seed}"
            way_out = f"raise config.listops.train_examples={options.train_examples}"
        super().__init__(
            config,
            splits,
            classes=CLASSES,
            vocab_size=VOCAB_SIZE,
            description=f"ListOps, {origin}; ",
            way_out=way_out,
        )


def _drawn(options: ListOpsConfig, length: int) -> dict[str, Examples]:
    """Draws the examples of each split."""
    trees = Trees(max_depth=options.max_depth, longer_than=options.longer_than, shorter_than=length)
    counts = {name: getattr(options, f"{name}_examples") for name in SPLITS}
    return {
        name: draw_examples(count, seed=options.data_seed, split=split, trees=trees)
        for split, (name, count) in enumerate(counts.items())
    }


def _read(data) -> dict[str, Examples]:
    """Reads the examples of each split."""
    if not data.valid_files:
        raise ValueError(
            'config.data.valid_files must name a file for config.task="listops" with '
            'config.data.source="files", got ()'
        )
    splits = {}
    for name in SPLITS:
        if getattr(data, f"{name}_files"):
            paths = named_paths(data, f"{name}_files")
            parts = [read_examples(path, data.sequence_length) for path in paths]
            inputs = [x for part in parts for x in part.inputs]
            splits[name] = Examples(inputs, np.concatenate([part.labels for part in parts]))
    return splits
