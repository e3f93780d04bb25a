"""Associative recall (MQAR) by the number of pairs and by the size of the state.

Each row has convolutions on queries, keys and values, so that rows differ in the attention only.
The state is given in numbers a layer, for two heads of 64: F (V + 1) for RACE and linear attention,
whose F is 2^P L and 64, F V for the delta rule on RACE's features, and H V for the matrices of the
gated ones. Fewer or more heads change it. The gated methods and the delta rule on RACE's features
have the output norm and the output gate, which are there by default. Four rows of RACE have the
norm. The other ones, and one of the delta rule, have neither.
All rows have one learning rate. `small` has half of the steps of `configs/recall.py`, half of its
rows in a batch, and three times its learning rate.
"""

from experiments.methods import PAPER, options, plain, race
from experiments.table import TINY, Data, Method, Metric, Table
from experiments.text import short

ACCURACY = Metric("valid.accuracy", "accuracy, %", 1, 100.0, lowest_is_best=False)
HEADS = 2


def pairs(number: int, length: int) -> Data:
    """Returns the data with so many pairs."""
    return Data(
        f"pairs_{number}",
        f"{number} pairs among {length} tokens",
        "configs/recall.py",
        (ACCURACY,),
        settings={"recall.num_pairs": number, "data.sequence_length": length},
        size=number,
    )


def convolved(method: Method) -> Method:
    """Returns a method with the convolutions, which are there from the start."""
    change = options(str(method.settings["model.attention"]), short_conv="qkv")
    return Method(method.name, method.label, {**method.settings, **change})


def of_state(method: Method, heads: int) -> Method:
    """Returns a gated method with so many heads of 128 / heads, which changes its state."""
    size = 128 // heads
    label = f"{method.label}, {heads} heads of {size}: {heads * size * size:,}"
    if heads == HEADS:
        return Method(method.name, label, method.settings)
    return method.but(f"{method.name}_{heads}", label, {"model.num_heads": heads})


def race_rows() -> tuple[Method, ...]:
    """Returns RACE with 32 to 256 features a head: P = 2 with several L, and P = 4, L = 4.

    Those with 64 features are there with the output norm as well, and so are fewer tables of more
    planes.
    """
    own = {"short_conv": "qkv", "use_tanh": False, "sharpness": 1.0, "num_planes": 2}
    first = race("race_32", f"RACE, P = 2, L = 8: {HEADS * 32 * 65:,}", num_tables=8, **own)
    wider = (
        first.but(
            f"race_{4 * tables}",
            f"RACE, P = 2, L = {tables}: {HEADS * 4 * tables * 65:,}",
            options("race", num_tables=tables),
        )
        for tables in (16, 64)
    )
    sharper = [
        first.but(
            f"race_p{planes}",
            f"RACE, P = {planes}, L = {tables}: {HEADS * 64 * 65:,}",
            options("race", num_planes=planes, num_tables=tables),
        )
        for planes, tables in ((4, 4), (5, 2), (6, 1))
    ]
    rows = (first, *wider, sharper[0])
    normed = [
        row.but(f"{row.name}_norm", f"{row.label}, output norm", options("race", output_norm="rms"))
        for row in (rows[1], *sharper)
    ]
    return (*rows, *normed)


def delta_rows() -> tuple[Method, ...]:
    """Returns the delta rule on the features of `race_64`, with its own parts and with RACE's."""
    label = f"delta rule on RACE's features, P = 2, L = 16: {HEADS * 64 * 64:,}"
    sizes = options("race_delta", num_planes=2, num_tables=16)
    first = convolved(plain("race_delta", label))
    first = Method(first.name, label, {**first.settings, **sizes})
    bare = options("race_delta", output_norm=None, output_gate=None)
    return (first, first.but("race_delta_bare", f"{label}, no output norm and gate", bare))


GATED = [convolved(plain(name, label)) for name, label in (
    ("gated_linear", "gated linear attention"), ("gated_delta", "gated delta net")
)]  # fmt: skip
PAPER_FORM = f"RACE, the paper's form (P = 4, L = 4): {HEADS * 64 * 65:,}"

TABLE = Table(
    name="recall",
    title="Associative recall",
    data=(pairs(4, 64), pairs(8, 64), pairs(16, 128), pairs(32, 256), pairs(64, 512)),
    methods=(
        convolved(plain("softmax", "softmax, RoPE: all tokens", positions="rope")),
        convolved(plain("linear", f"linear (elu + 1): {HEADS * 64 * 65:,}")),
        *(of_state(method, heads) for method in GATED for heads in (HEADS, 4, 1)),
        race("race_paper", PAPER_FORM, num_planes=4, num_tables=4, short_conv="qkv", **PAPER),
        *race_rows(),
        *delta_rows(),
    ),
    budgets={
        "tiny": TINY | {"recall.vocab_size": 64, "recall.held_out_rows": 8, "recall.num_pairs": 2},
        "small": short(2000) | {"optimizer.learning_rate": 3e-3, "run.batch_size": 128},
    },
    tiny=("pairs_4", "softmax", "race_paper"),
    size_label="pairs",
)
