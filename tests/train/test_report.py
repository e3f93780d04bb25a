"""The line that names the attentions of a run."""

import pytest

from race_jax.train.config import Config
from race_jax.train.mesh import make_mesh
from race_jax.train.report import _attention


@pytest.mark.parametrize(("num_layers", "every"), [(8, 4), (3, 3)])
def test_a_hybrid_is_named_with_the_share_that_it_has(num_layers, every):
    config = Config()
    config.model.num_layers, config.model.hybrid = num_layers, "sliding_window"
    config.mesh.data = 1
    config = config.validate()
    name, _ = _attention(config, make_mesh(config), is_causal=True)
    assert name == f"race, implementation xla; in one block of {every}, sliding_window"
