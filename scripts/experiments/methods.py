"""The methods that several tables compare. Each differs from another one by one change.

The names of options are those of `scripts/train_lm.py --help`.
"""

from experiments.table import Method

# Causal attention.
SOFTMAX = Method(
    "softmax",
    "softmax, learned positions",
    {"model.attention": "softmax", "model.positions": "learned"},
)
SOFTMAX_ROPE = SOFTMAX.but("softmax_rope", "softmax, RoPE", {"model.positions": "rope"})
SOFTMAX_ALIBI = SOFTMAX.but("softmax_alibi", "softmax, ALiBi", {"model.positions": "alibi"})

LINEAR = Method("linear", "linear (elu + 1)", {"model.attention": "linear"})

# The paper's form: planes of unit scale, one trained sharpness, and nothing beside the hash.
RACE_PAPER = Method(
    "race_paper",
    "RACE, the paper's form (P = 4, L = 4)",
    {
        "model.attention": "race",
        "model.race.num_planes": 4,
        "model.race.num_tables": 4,
        "model.race.planes_scale": 1.0,
        "model.race.sharpness": 1.0,
        "model.race.shared_sharpness": True,
        "model.race.forget_gate": None,
    },
)
RACE_PLAIN = Method(
    "race_plain",
    "RACE without gate (P = 3, L = 8)",
    {
        "model.attention": "race",
        "model.race.num_planes": 3,
        "model.race.num_tables": 8,
        "model.race.forget_gate": None,
    },
)
RACE = RACE_PLAIN.but("race", "RACE, data gate", {"model.race.forget_gate": "data"})
RACE_CONV = RACE.but("race_conv", "+ short convolution", {"model.race.short_conv": True})
RACE_FULL = RACE_CONV.but("race_full", "+ output gate", {"model.race.output_gate": True})
RACE_NARROW = RACE_FULL.but(
    "race_p2_l16",
    "the same, P = 2, L = 16",
    {"model.race.num_planes": 2, "model.race.num_tables": 16},
)
RACE_NOWHERE = RACE_FULL.but("race_none", "the same, no positions", {"model.positions": "none"})

CAUSAL = (
    *(SOFTMAX, SOFTMAX_ROPE, SOFTMAX_ALIBI, LINEAR),
    *(RACE_PAPER, RACE_PLAIN, RACE, RACE_CONV, RACE_FULL, RACE_NARROW, RACE_NOWHERE),
)
