"""The scan over spans that several devices hold, against one span after the other."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from race_jax.core import scan
from tests.test_scan import draw_spans, one_after_the_other


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "back in time"])
@pytest.mark.parametrize("by", ["scan", "product"])
def test_devices_continue_each_other(rng, by, reverse, assert_close):
    """Every device holds two spans; only the one where time starts is given the first sums."""
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    factors, sums, first = draw_spans(rng)
    wanted = one_after_the_other(factors, sums, first, reverse=reverse)

    def stretch(factors, sums, first):
        at = jax.lax.axis_index("seq") == (3 if reverse else 0)
        first = jax.tree.map(lambda x: jnp.where(at, x, 0.0), first)
        run = functools.partial(scan.exclusive, by=by, reverse=reverse, axis_name="seq")
        entering, leaving = run(factors, sums, first)
        return entering, jax.tree.map(lambda x: x[None], leaving)

    split = P(None, None, "seq")
    run = jax.shard_map(
        stretch, mesh=mesh, in_specs=(split, split, P()), out_specs=(split, P("seq"))
    )
    entering, leaving = jax.jit(run)(factors, sums, first)
    assert_close("entering", entering, wanted[0], kind="streamed")
    last = jax.tree.map(lambda x: x[0 if reverse else 3], leaving)
    assert_close("leaving", last, wanted[1], kind="streamed")
