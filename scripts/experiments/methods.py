"""The methods that several tables compare. Each is made from another one by one change.

The names of options are those of `scripts/train_lm.py --help`. Every attention has the same parts:
a short convolution on queries, keys and values, a forgetting gate, a norm and a gate of the output.
"""

from typing import Any

from experiments.table import Method


def options(attention: str, **values: Any) -> dict[str, Any]:
    """Returns the settings of an attention's own options.

    Example:
        >>> options("linear", forget_gate="data")
        {'model.linear.forget_gate': 'data'}
    """
    return {f"model.{attention}.{name}": value for name, value in values.items()}


def plain(attention: str, label: str, **positions: str) -> Method:
    """Returns an attention with its default options.

    Args:
        attention: its name, which is also that of the method.
        label: the label of the method.
        **positions: `positions` of the model, if the method sets them.
    """
    model = {f"model.{name}": value for name, value in positions.items()}
    return Method(attention, label, {"model.attention": attention, **model})


PARTS = {"short_conv": "qkv", "output_norm": "rms", "output_gate": "sigmoid"}


def with_parts(method: Method, label: str) -> Method:
    """Returns a method with the convolutions, the output norm and the sigmoid output gate."""
    change = options(str(method.settings["model.attention"]), **PARTS)
    return method.but(f"{method.name}_full", label, change)


def hybrid(method: Method, name: str, label: str, second: str, **values: Any) -> Method:
    """Returns a method whose every 4th block has a second attention, with ALiBi and all parts."""
    change = {
        "model.hybrid": second,
        "model.hybrid_every": 4,
        "model.positions": "alibi",
    }
    return method.but(name, label, change | options(second, **PARTS, **values))


def race(name: str, label: str, **values: Any) -> Method:
    """Returns RACE with some options, and otherwise without parts and with tanh in its hash."""
    own = options("race", **(BARE | values))
    return Method(name, label, {"model.attention": "race", **own})


BARE = {
    "use_tanh": True,
    "sharpness": 2.0,
    "short_conv": None,
    "output_norm": None,
    "output_gate": None,
}
# The paper's form: planes of unit scale, one trained sharpness, and nothing beside the hash.
PAPER = {
    "planes_scale": 1.0,
    "sharpness": 1.0,
    "shared_sharpness": True,
    "forget_gate": None,
}

SOFTMAX = plain("softmax", "softmax, learned positions", positions="learned")
ROPE = {"model.positions": "rope"}
SOFTMAX_ROPE = SOFTMAX.but("softmax_rope", "softmax, RoPE", ROPE)
SOFTMAX_ALIBI = SOFTMAX.but("softmax_alibi", "softmax, ALiBi", {"model.positions": "alibi"})
SOFTMAX_ROPE_FULL = with_parts(SOFTMAX_ROPE, "softmax, RoPE, all parts")
SOFTMAX_FULL = with_parts(SOFTMAX_ALIBI, "softmax, ALiBi, with convolutions, norm and output gate")
SIGMOID = plain("sigmoid", "sigmoid")
ANGULAR = plain("angular", "exact angular, degree 8")
PERFORMER = plain("performer", "Performer (256 features)")
LINEAR = plain("linear", "linear (elu + 1)")
LINEAR_GATE = LINEAR.but("linear_gate", "linear, data gate", options("linear", forget_gate="data"))
LINEAR_FULL = with_parts(LINEAR_GATE, "linear, data gate, convolutions, norm and output gate")
NO_POSITIONS = {"model.positions": "none"}
LINEAR_BEST = LINEAR_FULL.but("linear_best", "… no positions", NO_POSITIONS)
GATED_LINEAR = plain("gated_linear", "gated linear attention, as published", positions="none")
GATED_LINEAR_SIGMOID = GATED_LINEAR.but(
    "gated_linear_sigmoid",
    "gated linear attention, sigmoid output gate",
    options("gated_linear", output_gate="sigmoid"),
)
GATED_DELTA = plain("gated_delta", "gated delta net, as published", positions="none")
GATED_DELTA_SIGMOID = GATED_DELTA.but(
    "gated_delta_sigmoid",
    "gated delta net, sigmoid output gate",
    options("gated_delta", output_gate="sigmoid"),
)

RACE_PAPER = race(
    "race_paper", "RACE, the paper's form (P = 4, L = 4)", num_planes=4, num_tables=4, **PAPER
)
RACE_PLAIN = race("race_plain", "RACE (P = 3, L = 8)", num_planes=3, num_tables=8, forget_gate=None)
RACE = RACE_PLAIN.but("race", "RACE, data gate", options("race", forget_gate="data"))
RACE_P4 = RACE.but(
    "race_p4",
    "RACE, data gate, P = 4, L = 4, no positions",
    NO_POSITIONS | options("race", num_planes=4, num_tables=4),
)
RACE_CONV = RACE.but("race_conv", "… and convolutions", options("race", short_conv="qkv"))
RACE_NORM = RACE_CONV.but("race_norm", "… and output norm", options("race", output_norm="rms"))
RACE_FULL = RACE_NORM.but("race_full", "RACE, all parts", options("race", output_gate="sigmoid"))
RACE_SMOOTH = RACE_FULL.but(
    "race_smooth",
    "RACE, all parts, hash without tanh",
    options("race", use_tanh=False, sharpness=1.0),
)
RACE_WIDE = RACE_SMOOTH.but(
    "race_wide",
    "RACE, all parts, without tanh, P = 2, L = 16",
    options("race", num_planes=2, num_tables=16),
)
RACE_BEST = RACE_WIDE.but(
    "race_best", "RACE, all parts, without tanh, P = 2, L = 16, no positions", NO_POSITIONS
)
RACE_WINDOW = hybrid(
    RACE_BEST,
    "race_window",
    "RACE, every 4th block a window of 256 tokens, ALiBi",
    "sliding_window",
    window=256,
)
RACE_HYBRID = hybrid(RACE_BEST, "race_hybrid", "RACE, every 4th block softmax, ALiBi", "softmax")
RACE_WINDOW_ROPE = RACE_WINDOW.but(
    "race_window_rope", "RACE, every 4th block a window of 256 tokens, RoPE", ROPE
)
RACE_HYBRID_ROPE = RACE_HYBRID.but("race_hybrid_rope", "RACE, every 4th block softmax, RoPE", ROPE)
RACE_HYBRID2_ROPE = RACE_HYBRID_ROPE.but(
    "race_hybrid2_rope", "RACE, every 2nd block softmax, RoPE", {"model.hybrid_every": 2}
)

# What the parts of RACE are worth: each differs from RACE_FULL or RACE_BEST by one change.
RACE_FORMS = (
    *(RACE_PAPER, RACE_PLAIN, RACE, RACE_CONV, RACE_NORM, RACE_FULL),
    RACE_FULL.but("race_silu", "… silu output gate", options("race", output_gate="silu")),
    RACE_FULL.but("race_unnormed", "… no output norm", options("race", output_norm=None)),
    RACE_FULL.but(
        "race_before", "… one convolution before all", options("race", short_conv="before")
    ),
    RACE_FULL.but("race_p2", "… P = 2, L = 16", options("race", num_planes=2, num_tables=16)),
    RACE_FULL.but("race_p5", "… P = 5, L = 2", options("race", num_planes=5, num_tables=2)),
    *(RACE_SMOOTH, RACE_WIDE, RACE_BEST),
    RACE_BEST.but("race_learned", "… learned planes", options("race", learn_planes=True)),
    RACE_BEST.but("race_one_beta", "… one β a layer", options("race", shared_sharpness=True)),
    RACE_BEST.but("race_l32", "… P = 2, L = 32", options("race", num_tables=32)),
    RACE_BEST.but("race_p1", "… P = 1, L = 32", options("race", num_planes=1, num_tables=32)),
    RACE_BEST.but("race_p3", "… P = 3, L = 8", options("race", num_planes=3, num_tables=8)),
    *(RACE_WINDOW, RACE_HYBRID),
    RACE_WINDOW.but(
        "race_window2",
        "… every 2nd block, of 128 tokens",
        {"model.hybrid_every": 2, **options("sliding_window", window=128)},
    ),
    RACE_WINDOW.but("race_window_128", "… of 128 tokens", options("sliding_window", window=128)),
    RACE_HYBRID.but("race_hybrid2", "… every 2nd block", {"model.hybrid_every": 2}),
    RACE_BEST.but("race_half_life", "… longest half-life 2048", options("race", half_life=2048.0)),
)

CAUSAL = (
    *(
        SOFTMAX,
        SOFTMAX_ROPE,
        SOFTMAX_ALIBI,
        SOFTMAX_ROPE_FULL,
        SOFTMAX_FULL,
        SIGMOID,
        ANGULAR,
        PERFORMER,
    ),
    *(LINEAR, LINEAR_GATE, LINEAR_FULL, LINEAR_BEST, GATED_LINEAR, GATED_LINEAR_SIGMOID),
    *(GATED_DELTA, GATED_DELTA_SIGMOID),
    *(RACE_PAPER, RACE_PLAIN, RACE, RACE_FULL, RACE_WIDE, RACE_BEST, RACE_WINDOW, RACE_HYBRID),
    *(RACE_WINDOW_ROPE, RACE_HYBRID_ROPE, RACE_HYBRID2_ROPE),
)

# Models that see all tokens. They take the positions, and RACE the P and L, of the configuration.
ENCODER_SOFTMAX = plain("softmax", "softmax")
ENCODER_RACE = race("race", "RACE", forget_gate=None)
ENCODER_RACE_SMOOTH = ENCODER_RACE.but(
    "race_smooth", "RACE, hash without tanh", options("race", use_tanh=False, sharpness=1.0)
)
ENCODER_LINEAR_TIME = (
    ENCODER_SOFTMAX,
    *(LINEAR, PERFORMER, plain("linformer", "Linformer (128)")),
    race("race_paper", "RACE, the paper's form", **PAPER),
    *(ENCODER_RACE, ENCODER_RACE_SMOOTH),
    ENCODER_RACE_SMOOTH.but(
        "race_wide",
        "RACE, without tanh, P = 2, L = 16",
        options("race", num_planes=2, num_tables=16),
    ),
    # With convolutions a layer sees the three tokens before each one, whatever its attention.
    *(
        method.but(f"{method.name}_conv", f"{method.label}, convolutions", change)
        for method, change in (
            (ENCODER_SOFTMAX, options("softmax", short_conv="qkv")),
            (LINEAR, options("linear", short_conv="qkv")),
            (ENCODER_RACE_SMOOTH, options("race", short_conv="qkv")),
        )
    ),
)
ENCODER = (*ENCODER_LINEAR_TIME, SIGMOID, ANGULAR)
