"""States of sliding-window attention: which documents they keep apart, and which are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.core.sliding_window import WindowState, sliding_window_attention

B, N, K, H, V, W = 2, 4, 2, 6, 3, 6


def drawn(rng, length, dtype=np.float32):
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, V)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("ids", [(0, 0, 0), (1, 0, 0)])
def test_an_id_that_comes_again_in_a_later_call_is_another_document(rng, assert_close, ids):
    """The state of RACE starts anew there too. Ids that are traced cannot be checked for runs."""
    first, then = drawn(rng, 4), drawn(rng, 3)
    _, state = sliding_window_attention(
        *first, window=W, segment_ids=jnp.array([[0, 0, 0, 1]] * B), return_state=True
    )
    assert state.segments.tolist() == [[-1] * 5 + [1]] * B
    new = ids.index(0)  # from here on, tokens are of the new document

    @jax.jit
    def continued(state, segments):
        return sliding_window_attention(
            *then, window=W, segment_ids=segments, initial_state=state, return_state=True
        )

    out, state = continued(state, jnp.array([ids] * B))
    want = sliding_window_attention(*(x[:, new:] for x in then), window=W)
    assert_close("out", out[:, new:], want, kind="outputs")
    assert state.segments.tolist() == [[-1] * (W - 3 + new) + [0] * (3 - new)] * B


def test_values_wider_than_keys_are_not_rounded(rng, assert_close):
    query, key, value = drawn(rng, 7)
    query, key = query.astype(jnp.bfloat16), key.astype(jnp.bfloat16)
    out = sliding_window_attention(query, key, value, window=3)
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    want = sliding_window_attention(query, key, value, window=3)
    assert_close("out", out, want, kind="outputs")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, W, K, H, V), r"initial_state.key has shape \(1, 6, 2, 6\), .* need \(2, 6, 2, 6\)"),
        ((B, W, 1, H, V), r"initial_state.key has shape \(2, 6, 1, 6\)"),
        ((B, W, K, H, V + 1), r"initial_state.value has shape \(2, 6, 2, 4\)"),
        ((B, W + 1, K, H, V), "the state holds the last 7 tokens, and window=6"),
    ],
)
def test_a_state_of_other_sizes_is_refused(rng, sizes, words):
    with pytest.raises(ValueError, match=words):
        sliding_window_attention(*drawn(rng, 3), window=W, initial_state=WindowState.init(*sizes))


def test_integers_and_fractions_of_a_token_are_refused(rng):
    query, key, value = drawn(rng, 3)
    with pytest.raises(TypeError, match="query must be floating, got int32"):
        sliding_window_attention(query.astype(jnp.int32), key, value, window=W)
    with pytest.raises(TypeError, match=r"window must be an integer, got 2\.5"):
        sliding_window_attention(query, key, value, window=2.5)
