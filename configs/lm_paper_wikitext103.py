r"""The paper's language model on WikiText-103, with the paper's training settings.

It has 8 layers of width 512 with 8 heads, 4 tables of 4 planes, and 1,024 byte pairs of context. A
step takes 192 sequences in 12 parts. The optimizer is AdamW with a learning rate of 6e-4, which
falls linearly to zero after a warm-up of 1 % of the steps. The attention has the data gate, which
goes beyond the paper. `--config.model.race.forget_gate=none` removes it.

Command:  .venv/bin/python scripts/train_lm.py --config configs/lm_paper_wikitext103.py \
              --config.data.tokenizer_file=gpt2-tokenizer.json
Hardware: a GPU; no whole run has been timed
Data:     Salesforce/wikitext, wikitext-103-raw-v1, which the package `datasets` downloads, and
          the byte pairs of GPT-2 as a JSON file of the package `tokenizers`
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.model.num_layers = 8
    config.model.width = 512
    config.model.num_heads = 8
    config.model.dropout_rate = 0.1
    config.model.positions = "learned"
    config.model.max_length = 1024
    config.model.race.num_tables = 4
    config.model.race.num_planes = 4
    config.model.dtype = "bfloat16"

    config.data.source = "huggingface"
    config.data.dataset = "Salesforce/wikitext"
    config.data.dataset_config = "wikitext-103-raw-v1"
    config.data.tokenizer = "bpe"
    config.data.tokenizer_file = "gpt2-tokenizer.json"
    config.data.sequence_length = 1024

    config.optimizer.learning_rate = 6e-4
    config.optimizer.end_learning_rate = 0.0
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 600
    config.optimizer.b2 = 0.999
    config.optimizer.accumulation_steps = 12

    # 100 epochs of about 118 million byte pairs.
    config.run.steps = 60_000
    config.run.batch_size = 192
    config.run.eval_every = 2000
    config.run.checkpoint_every = 2000
    return config
