"""Random tokens, and attention over lists of them in float64, for the tests of decoding."""

import numpy as np
import pytest


def draw_tokens(rng, batch, length, heads, kv_heads, head_dim, value_dim, dtype=np.float32):
    """Queries, keys and values of some tokens, each (B, T, heads, width)."""
    sizes = (heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)
    arrays = [rng.normal(size=(batch, length, *size)).astype(np.float32) for size in sizes]
    return [array.astype(dtype) for array in arrays]


def attend_over(query, key, value, mask, slopes=None, last=None, log_decay=None, weigh=None):
    """Causal attention from the last tokens over the real tokens, as a loop in float64.

    It is softmax attention, or has the weights that ``weigh(logits)`` returns, which are not
    divided by their sum.
    """
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    log_decay = 0 * key[..., 0] if log_decay is None else np.asarray(log_decay, np.float64)
    total = np.cumsum(log_decay * mask[..., None], axis=1)
    rows, length, heads, width = query.shape
    group = heads // key.shape[2]
    out = np.zeros((rows, length, heads, value.shape[-1]))
    for b, t, n in np.ndindex(rows, length, heads):
        if not mask[b, t] or t < length - (last or length):
            continue
        sees = np.flatnonzero(mask[b, : t + 1])
        logits = key[b, sees, n // group] @ query[b, t, n] / np.sqrt(width)
        if slopes is not None:
            logits -= float(slopes[n]) * np.arange(len(sees))[::-1]
        faded = total[b, t, n // group] - total[b, sees, n // group]
        if weigh is None:
            weights = np.exp(logits + faded - (logits + faded).max())
            weights /= weights.sum()
        else:
            weights = np.exp(faded) * weigh(logits)
        out[b, t, n] = weights @ value[b, sees, n // group]
    return out[:, -(last or length) :]


def check_refusals(cases):
    """Checks that every call raises an error of its kind, with these words in the message.

    Args:
        cases: for each name, the call, the kind of the error, and the words.
    """
    for name, (call, kind, words) in cases.items():
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value), name
