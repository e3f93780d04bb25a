"""Read a prompt once, then decode token by token with a state of fixed size.

    .venv/bin/python examples/decode_with_state.py

Causal RACE attention carries running sums from one call to the next. Their size does not depend on
how many tokens they have seen. The state is a value: keeping an old one is all it takes to go back,
which this example uses to try two continuations of one prompt.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.models import ModelConfig, TransformerLM

PROMPT, NEW = 200, 5


def state_bytes(state: object) -> int:
    """The memory that a state takes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def main() -> None:
    """Compares decoding with a state with reading everything again, and branches a sequence."""
    config = ModelConfig(num_layers=2, width=64, num_heads=4)
    model = TransformerLM(config, vocab_size=100, rngs=nnx.Rngs(0))
    read = nnx.jit(lambda model, tokens, state: model(tokens, state=state))
    prompt = jax.random.randint(jax.random.key(0), (1, PROMPT), 0, 100)

    logits, after_prompt = read(model, prompt, model.init_state(batch=1))
    print(f"the state after {PROMPT} tokens takes {state_bytes(after_prompt)} bytes")

    state, tokens = after_prompt, prompt
    for _ in range(NEW):
        token = logits[:, -1:].argmax(-1)
        tokens = jnp.concatenate([tokens, token], axis=1)
        logits, state = read(model, token, state)
    print(f"the state after {PROMPT + NEW} tokens takes {state_bytes(state)} bytes")

    again = model(tokens)[:, -1]
    difference = jnp.abs(logits[:, -1] - again).max()
    print(f"decoding differs from reading everything again by {difference:.1e}")

    for token in (1, 2):  # two continuations from the same state
        logits, _ = read(model, jnp.full((1, 1), token), after_prompt)
        print(f"after token {token} the likeliest next token is {int(logits[0, -1].argmax())}")


if __name__ == "__main__":
    main()
