"""Gradients in the form in which tests compare them."""

import numpy as np
from flax import nnx


def with_biases_as_rows(gradients):
    """Joins every bias to its kernel, as the row of an input that is 1.

    The sums behind the few numbers of a bias may nearly cancel.
    """
    flat = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(gradients)}
    for *path, name in list(flat):
        kernel = (*path, str(name).replace("bias", "kernel"))
        if str(name).endswith("bias") and kernel in flat:
            bias = flat.pop((*path, name)).reshape(1, -1)
            flat[kernel] = np.concatenate([flat[kernel].reshape(-1, bias.size), bias])
    return {".".join(map(str, path)): x for path, x in flat.items()}
