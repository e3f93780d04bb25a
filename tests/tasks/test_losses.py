"""The chunked loss equals the plain one, and needs less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from race_jax.tasks.losses import chunked_cross_entropy

BATCH, LENGTH, WIDTH, VOCAB = 2, 13, 8, 21


def plain_cross_entropy(hidden, embedding, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, embedding).astype(jnp.float32)
    nats = -jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(nats, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(picked * weights), jnp.sum(weights)


@pytest.fixture
def problem(rng):
    hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (BATCH, LENGTH)), jnp.float32)
    return hidden, embedding, targets, weights


def mean_loss(loss, **options):
    def mean(hidden, embedding, weights, targets):
        nats, weight = loss(hidden, embedding, targets, weights, **options)
        return nats / weight

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2)))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("vocab", [16, VOCAB], ids=["aligned", "odd"])
@pytest.mark.parametrize("chunk", [1, 5, 26, 100, None])
def test_value_and_every_gradient_equal_the_plain_loss(problem, chunk, vocab, sparse, assert_close):
    hidden, embedding, targets, weights = problem
    embedding, targets = embedding[:vocab], targets % vocab
    loss = mean_loss(chunked_cross_entropy, chunk=chunk, sparse=sparse)
    got = loss(hidden, embedding, weights, targets)
    want = mean_loss(plain_cross_entropy)(hidden, embedding, weights, targets)
    assert_close("loss", got[0], want[0], kind="outputs")
    for name, gradient, expected in zip(
        ("hidden", "embedding", "weights"), got[1], want[1], strict=True
    ):
        # A sparse loss computes no nats of tokens without weight.
        seen = weights != 0 if sparse and name == "weights" else 1.0
        assert_close(name, seen * gradient, seen * expected, kind="gradients")


@pytest.mark.parametrize("vocab", [16, VOCAB], ids=["aligned", "odd"])
def test_chunks_without_weights_are_left_out(problem, vocab, assert_close):
    """Their targets are no ids, and their hidden states would make the loss infinite."""
    hidden, embedding, targets, weights = problem
    embedding, targets = embedding[:vocab], targets % vocab
    last = jnp.arange(LENGTH) >= LENGTH - 3
    weights = jnp.where(last, weights + 1, 0.0)
    huge = jnp.where(last[:, None], hidden, 1e30)
    run = mean_loss(chunked_cross_entropy, chunk=3, sparse=True)
    got = run(huge, embedding, weights, jnp.where(last, targets, 10**6))
    want = mean_loss(plain_cross_entropy)(hidden, embedding, weights, targets)
    assert_close("loss", got[0], want[0], kind="outputs")
    assert_close("hidden", got[1][0], want[1][0], kind="gradients")
    assert_close("embedding", got[1][1], want[1][1], kind="gradients")


def test_bfloat16_keeps_float32_sums(problem, assert_close):
    hidden, embedding, targets, weights = problem
    rounded = hidden.astype(jnp.bfloat16)
    got = mean_loss(chunked_cross_entropy, chunk=4)(rounded, embedding, weights, targets)
    rounded_embedding = embedding.astype(jnp.bfloat16).astype(jnp.float32)
    want = mean_loss(plain_cross_entropy)(
        rounded.astype(jnp.float32), rounded_embedding, weights, targets
    )
    assert got[0].dtype == jnp.float32
    assert [gradient.dtype.name for gradient in got[1]] == ["bfloat16", "float32", "float32"]
    assert_close("loss", got[0], want[0], kind="outputs")
    for name, gradient, expected in zip(
        ("hidden", "embedding", "weights"), got[1], want[1], strict=True
    ):
        assert_close(name, gradient, expected, kind="gradients", dtype=jnp.bfloat16)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_inside_shard_map_equal_those_outside(problem, assert_close, sparse):
    """JAX checks what varies over devices on a mesh of one device as on a larger one."""
    hidden, embedding, targets, weights = problem
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows = P("data")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, P(), rows, rows), out_specs=(rows, P())
    )
    def gradients(hidden, embedding, targets, weights):
        def nats(hidden, embedding):
            loss = chunked_cross_entropy(
                hidden, embedding, targets, weights, chunk=5, sparse=sparse
            )
            return loss[0]

        return jax.grad(nats, argnums=(0, 1))(hidden, embedding)

    got = jax.jit(gradients)(hidden, embedding, targets, weights)
    want = jax.grad(lambda *a: plain_cross_entropy(*a, targets, weights)[0], argnums=(0, 1))(
        hidden, embedding
    )
    for name, gradient, expected in zip(("hidden", "embedding"), got, want, strict=True):
        assert_close(name, gradient, expected, kind="gradients")


@pytest.mark.parametrize("sparse", [False, True])
def test_vmap_is_a_loop(problem, assert_close, sparse):
    """Rows have different numbers of tokens with weights, so a sparse loss has chunks to spare."""
    hidden, embedding, targets, weights = problem
    weights = jnp.stack([weights, jnp.zeros_like(weights).at[0, 3].set(1.0)])

    def one(hidden, weights):
        run = mean_loss(chunked_cross_entropy, chunk=5, sparse=sparse)
        return run(hidden, embedding, weights, targets)

    got = jax.jit(jax.vmap(one, in_axes=(None, 0)))(hidden, weights)
    for i, row in enumerate(weights):
        want = one(hidden, row)
        assert_close(f"row {i}", jax.tree.map(lambda x, i=i: x[i], got), want, kind="gradients")


def test_a_token_of_weight_zero_leaves_no_trace(problem):
    hidden, embedding, targets, weights = problem
    weights = weights.at[0, 3].set(0.0)
    run = mean_loss(chunked_cross_entropy, chunk=5)
    before = run(hidden, embedding, weights, targets)
    after = run(hidden.at[0, 3].mul(-30.0), embedding, weights, targets.at[0, 3].set(0))
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1][1], after[1][1])
    assert not np.any(after[1][0][0, 3])


def test_no_weight_at_all_gives_zeros(problem):
    hidden, embedding, targets, weights = problem
    nats, weight = chunked_cross_entropy(hidden, embedding, targets, jnp.zeros_like(weights))
    assert (float(nats), float(weight)) == (0.0, 0.0)


def test_memory_does_not_grow_to_the_logits_of_all_tokens():
    length, vocab, width, chunk = 4096, 2048, 16, 64
    arguments = (
        jax.ShapeDtypeStruct((1, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    compiled = mean_loss(chunked_cross_entropy, chunk=chunk).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * vocab * 4 / 10


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": jnp.zeros((2, 13, 7))}, ValueError, r"with one D; got \(2, 13, 7\)"),
        ({"embedding": jnp.zeros(8)}, ValueError, r"embedding \(vocab, D\)"),
        ({"targets": jnp.zeros((2, 12), int)}, ValueError, r"must have hidden's \(B, T\)"),
        ({"targets": jnp.zeros((2, 13))}, TypeError, r"targets must be integers, got float32"),
        ({"weights": jnp.zeros(13)}, ValueError, r"targets and weights"),
        ({"chunk": 0}, ValueError, r"chunk must be >= 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(problem, change, error, message):
    names = ("hidden", "embedding", "targets", "weights")
    with pytest.raises(error, match=message):
        chunked_cross_entropy(**dict(zip(names, problem, strict=True)) | change)
