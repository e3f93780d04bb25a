"""A language model on an Explicit mesh that splits batch and sequence equals one device."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from race_jax import RACEAttention
from race_jax.models import ModelConfig, TransformerLM
from race_jax.models.transformer import Transformer

RACE = {
    "num_tables": 2,
    "num_planes": 2,
    "short_conv": "before",
    "output_norm": "rms",
    "output_gate": "silu",
}


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_one_device(packed, assert_close):
    race = RACE | ({"short_conv": "qkv"} if packed else {})
    config = ModelConfig(num_layers=1, width=16, num_heads=2, race=race)
    model = TransformerLM(config, vocab_size=20, rngs=nnx.Rngs(0))
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    batch = {"tokens": jnp.arange(96, dtype=jnp.int32).reshape(4, 24) * 7 % 20}
    if packed:
        batch["segment_ids"] = (jnp.arange(24)[None] // jnp.array([5, 9, 24, 3])[:, None]).astype(
            jnp.int32
        )
        batch["key_value_mask"] = jnp.arange(24)[None] < jnp.array([24, 20, 13, 24])[:, None]

    def loss(params, fixed, batch):
        logits = nnx.merge(graph, params, fixed)(**batch)
        weight = batch["key_value_mask"][..., None] if packed else 1.0
        return (weight * logits**2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    want = jax.device_get(step(params, fixed, batch))
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "seq"))):
        params, fixed = jax.device_put((params, fixed), P())
        batch = jax.device_put(batch, P("data", "seq"))
        got = jax.device_get(step(params, fixed, batch))
    assert_close("language model", got, want, kind="gradients")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("attention", ["race", "linear", "sliding_window"])
def test_a_mesh_may_split_the_sequence_of_any_model(rows, attention, assert_close):
    config = ModelConfig(num_layers=1, width=16, num_heads=2, attention=attention)
    model = TransformerLM(config, vocab_size=20, rngs=nnx.Rngs(0))
    tokens = jnp.arange(16 * rows, dtype=jnp.int32).reshape(rows, 16) * 7 % 20
    want = model(tokens)
    with jax.set_mesh(jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])):
        got = jax.device_get(model(jax.device_put(tokens, P(None, "seq"))))
    assert_close(attention, got, want, kind="outputs")


@pytest.mark.parametrize("name", ["embedding", "out"])
def test_a_mesh_may_split_a_parameter(name, assert_close):
    config = ModelConfig(num_layers=1, width=16, num_heads=2)
    model = Transformer(config, 20, is_causal=True, rngs=nnx.Rngs(0))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16) * 7 % 20
    want = model(tokens)
    graph, variables = nnx.split(model)

    def placed(path, x):
        path = jax.tree_util.keystr(path)
        split = f"'{name}'" in path and "bias" not in path
        return jax.device_put(x, P(*[None] * (x.ndim - 1), "fsdp") if split else P())

    with jax.set_mesh(jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])):
        variables = jax.tree_util.tree_map_with_path(placed, variables)
        got = jax.device_get(nnx.merge(graph, variables)(jax.device_put(tokens, P())))
    assert_close(name, got, want, kind="outputs")


def test_each_device_computes_its_share_of_the_tokens():
    """XLA would compute everything on every device if a block joined rows and tokens."""
    config = ModelConfig(num_layers=1, width=32, num_heads=2)
    model = TransformerLM(config, vocab_size=20, rngs=nnx.Rngs(0))
    graph, variables = nnx.split(model)

    def flops(devices: int) -> float:
        mesh = jax.make_mesh(
            (devices,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        split, whole = (jax.NamedSharding(mesh, spec) for spec in (P(None, "seq"), P()))
        tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32, sharding=split)
        given = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), variables
        )
        run = jax.jit(lambda v, tokens: nnx.merge(graph, v)(tokens), out_shardings=split)
        return run.lower(given, tokens).compile().cost_analysis()["flops"]

    assert flops(4) < 0.4 * flops(1)


def test_stretches_of_a_layer_drop_different_entries():
    layer = RACEAttention(
        2, 16, dropout_rate=0.5, deterministic=False, axis_name="seq", rngs=nnx.Rngs(0)
    )
    layer.out.bias[...] += 1.0
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def stretch(x):
        return layer(x, is_causal=True, rngs=nnx.Rngs(dropout=1))

    x = jnp.ones((1, 32, 16))
    run = jax.shard_map(stretch, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))
    dropped = (jax.jit(run)(x) == 0).reshape(4, -1)
    assert 0.3 < dropped.mean() < 0.7
    assert not any((dropped[0] == other).all() for other in dropped[1:])


@pytest.mark.parametrize("positions", ["none", "learned"])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_the_state_of_a_split_sequence_is_that_of_the_whole(kind, positions, assert_close):
    race = {"num_tables": 2, "num_planes": 2}
    config = ModelConfig(
        num_layers=1, width=16, num_heads=2, positions=positions, max_length=40, race=race
    )
    model = TransformerLM(config, vocab_size=20, rngs=nnx.Rngs(0))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16) * 7 % 20
    masks = {}
    if kind != "plain":  # the last device has no token of the second row
        lengths = jnp.array([16, 11])[:, None]
        masks["key_value_mask"] = (jnp.arange(16) < lengths) & (jnp.arange(16) != 2)
    if kind == "packed":  # of the first row, the second document fills the devices 1 and 2
        ends = jnp.array([[4, 13], [5, 6]])
        masks["segment_ids"] = (jnp.arange(16) >= ends[..., None]).sum(1, dtype=jnp.int32)
    _, state = model.hidden(tokens[:, :3], state=model.init_state(2))
    want = model.hidden(tokens, state=state, **masks)
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def stretch(tokens, masks):
        return nnx.view(model, axis_name="seq").hidden(tokens, state=state, **masks)

    split = jax.shard_map(
        stretch, mesh=mesh, in_specs=P(None, "seq"), out_specs=(P(None, "seq"), P())
    )
    got = jax.jit(split)(tokens, masks)
    assert got[1].position.tolist() == want[1].position.tolist()
    assert got[1].segment.tolist() == want[1].segment.tolist()
    assert_close(kind, got, want, kind="outputs")
