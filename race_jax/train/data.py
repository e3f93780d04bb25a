"""The data of a run: text to batches for training, and the held-out text to score.

In: a `DataConfig`. Out: `Data`: the tokenizer, an endless resumable stream of training batches,
and one pass over each held-out split. Equation: bits per byte = nats / (ln 2 * num_bytes).
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from race_jax.train import windows
from race_jax.train.config import PACKINGS, DataConfig
from race_jax.train.documents import Corpus, Document
from race_jax.train.records import at_least, one_of
from race_jax.train.sources import load_corpus, refuse_ignored
from race_jax.train.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer
from race_jax.train.windows import Batch, HostRows, Pieces, TokenStream
from race_jax.train.workers import read_ahead


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A held-out split.

    Attributes:
        text: its bytes, documents joined as the training text is; for `xz` beside the model.
        num_tokens: tokens that are scored, the sum of all weights: every token of the stream, or
            of each packed document, but the first, which nothing predicts.
        num_bytes: bytes of text that the scored tokens stand for.
        encodes_text: whether the text can be recovered from the tokens. If not, a loss in bits per
            byte of text means nothing.
        num_unknown: how many of the scored tokens are `<unk>`.
        batches: one pass in a fixed order. The last batch is filled up with rows of weight 0.
    """

    text: bytes
    num_tokens: int
    num_bytes: int
    encodes_text: bool
    num_unknown: int
    batches: grain.IterDataset[Batch]


@dataclasses.dataclass(frozen=True)
class Data:
    """What a training run reads.

    A batch is a dict of arrays (B, T), B this process's share of the batch: `inputs` and `targets`
    int32, `weights` float32 (0 where there is nothing to score), `segment_ids` int32 (all 0 in
    contiguous windows; packed, 1, 2, … and 0 for the empty tail) and `positions` int32 (from 0 in
    each segment).

    Attributes:
        tokenizer: text to ids and back.
        train: endless training batches; see `train_iterator`.
        valid, test: the held-out splits; `test` may be None.
        num_train_tokens: tokens of one epoch.
        digest: SHA-256 of all text; losses compare only at equal digests.
        tokenizer_digest: SHA-256 of the tokenizer and of the token ids of the training text.
        description: one line for the log: source, sizes, digest.
    """

    tokenizer: Tokenizer
    train: grain.IterDataset[Batch]
    valid: HeldOut
    test: HeldOut | None
    num_train_tokens: int
    digest: str
    tokenizer_digest: str
    description: str

    @property
    def digests(self) -> dict[str, str]:
        """The digests of all content that decides what is learned, for a resumed run to compare."""
        return {"text_digest": self.digest, "tokenizer_digest": self.tokenizer_digest}

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def held_out_bytes(self) -> int:
        """Bytes that the scored tokens of the validation split stand for."""
        return self.valid.num_bytes

    @property
    def held_out_text(self) -> bytes:
        """The bytes of the validation split."""
        return self.valid.text

    def train_iterator(
        self,
        state: dict[str, Any] | None = None,
        place: Callable[[Batch], Any] | None = None,
    ) -> grain.DatasetIterator[Any]:
        """A new iterator over the training batches, which reads one batch ahead of its use.

        `iterator.get_state()` is a small dict of JSON values. It counts the batches that were
        handed out. Given here, in any process that built the same data, it continues with the very
        next batch, also with another `num_workers`.

        Args:
            state: where to continue; None starts at the first batch.
            place: called with each batch ahead of its use, in the thread that reads; for example,
                it puts the batch on the devices. The iterator yields what it returns.

        Raises:
            ValueError: `state` comes from another kind of pipeline.
        """
        iterator = read_ahead(self.train, place)
        if state is not None:
            try:
                iterator.set_state(state)
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"the data iterator's state {state} was saved with another "
                    "config.data.packing; continue with the same"
                ) from error
        return iterator

    def evaluate(self, split: str = "valid") -> Iterable[Batch]:
        """One pass over a held-out split, "valid" or "test"; may be iterated again.

        Raises:
            ValueError: there is no such split.
        """
        one_of("split", split, ("valid", "test") if self.test else ("valid",))
        held_out = self.valid if split == "valid" else self.test
        return held_out.batches


def build_data(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Reads, tokenizes and cuts the text of a run; everything that can be wrong with it shows here.

    Training windows follow each other from an offset that changes with the epoch, in shuffled
    order, so that an epoch uses each token about once. Held-out windows of T + 1 tokens overlap by
    one, so that each token but the very first of the split is scored exactly once. Packed, whole
    documents share a row, one segment each; longer ones are first cut into such windows.

    Args:
        config: source, splits, tokenizer, packing, `sequence_length` T.
        batch_size: rows of the global batch, a multiple of process_count.
        seed: of the order of the training windows, in [0, 2**32).
        process_index: which of the processes this is; it reads its own rows of each global batch,
            the same rows that a single process would have there.
        process_count: number of processes.

    Returns:
        The data, in memory: one array of ids, one byte a token up to 256 ids.

    Raises:
        ValueError: a file or a field is unusable, the text is shorter than one window, or the
            held-out text holds what the vocabulary does not know; names the file or field.
        ImportError: an optional package is missing; says which extra to install.

    Example:
        >>> data = build_data(DataConfig(sequence_length=8), batch_size=2, seed=0)
        >>> batch = next(data.train_iterator())
        >>> batch["inputs"].shape, bool((batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all())
        ((2, 8), True)

    Source: beyond the paper.
    """
    one_of("config.data.packing", config.packing, PACKINGS)
    at_least("config.data.sequence_length", config.sequence_length, 1)
    config.validate_workers()
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    rows = HostRows(batch_size, process_index, process_count)
    corpus = _divided(load_corpus(config), config)
    tokenizer = build_tokenizer(config, _vocabulary_texts(corpus, config))
    train = _encode(corpus.train, tokenizer, config)
    _check_length(corpus.train, train, config)
    digest = corpus.digest()
    return Data(
        tokenizer=tokenizer,
        train=_training_batches(train, config, rows, seed),
        valid=_held_out(corpus.valid, tokenizer, config, rows),
        test=_held_out(corpus.test, tokenizer, config, rows) if corpus.test else None,
        num_train_tokens=len(train.ids),
        digest=digest,
        tokenizer_digest=_tokenizer_digest(tokenizer, train),
        description=_description(config, corpus, digest, tokenizer),
    )


def _divided(corpus: Corpus, config: DataConfig) -> Corpus:
    """The corpus with its files divided into documents, where packing asks for it."""
    refuse_ignored(config, "packing", {"document_separator": ("packed",)})
    separator = config.document_separator.encode()
    if not separator:
        return corpus

    def divided(split: tuple[Document, ...]) -> tuple[Document, ...]:
        parts = tuple(
            Document(f"{document.name}[{index}]", part)
            for document in split
            for index, part in enumerate(document.data.split(separator))
            if part
        )
        if split and not parts:
            raise ValueError(
                f"{split[0].name}: holds nothing but config.data.document_separator "
                f"{config.document_separator!r}"
            )
        return parts

    return Corpus(divided(corpus.train), divided(corpus.valid), divided(corpus.test))


def _vocabulary_texts(corpus: Corpus, config: DataConfig) -> Iterator[str]:
    """The training texts, and what joins documents where any are joined."""
    yield from (document.text() for document in corpus.train)
    joins = any(len(split) > 1 for split in (corpus.train, corpus.valid, corpus.test))
    if joins and config.packing == "contiguous":
        yield Tokenizer.separator


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, config: DataConfig) -> TokenStream:
    """The ids of a split: each document apart when packed, else all joined by the separator."""
    encoded = [_encode_document(document, tokenizer) for document in documents]
    if config.packing == "packed" or len(documents) == 1:
        return TokenStream.of(encoded)
    separator = tokenizer.encode(tokenizer.separator)
    joined = [part for ids in encoded for part in (separator, ids)][1:]
    return TokenStream.of([np.concatenate(joined)])


def _encode_document(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(document.data)
    text = document.text()
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error


def _check_length(documents: Sequence[Document], stream: TokenStream, config: DataConfig) -> None:
    """Raises ValueError where the training text does not fill one window."""
    names = documents[0].name + f" and {len(documents) - 1} more" * (len(documents) > 1)
    length = config.sequence_length
    if config.packing == "packed":
        if not Pieces(stream, length).num_targets:
            raise ValueError(f"{names}: no document has two tokens, so there is nothing to learn")
    elif len(stream.ids) <= length:
        raise ValueError(
            f"{names}: {len(stream.ids)} tokens are fewer than the {length + 1} of one window; "
            f"give more text, or lower config.data.sequence_length={length}"
        )


def _training_batches(
    stream: TokenStream, config: DataConfig, rows: HostRows, seed: int
) -> grain.IterDataset[Batch]:
    length = config.sequence_length
    if config.packing == "packed":
        return windows.train_packed(stream, length, rows=rows, seed=seed)
    return windows.train_windows(
        stream.ids, length, rows=rows, seed=seed, num_workers=config.num_workers
    )


def _held_out(
    documents: Sequence[Document], tokenizer: Tokenizer, config: DataConfig, rows: HostRows
) -> HeldOut:
    stream = _encode(documents, tokenizer, config)
    num_tokens = Pieces(stream, config.sequence_length).num_targets
    if not num_tokens:
        raise ValueError(
            f"{documents[0].name}: the held-out text has no two tokens that follow each other, so "
            "there is nothing to score"
        )
    text = tokenizer.separator.encode().join(document.data for document in documents)
    texts = [document.data for document in documents] if config.packing == "packed" else [text]
    parts = [
        (data, stream.ids[start:stop])
        for data, (start, stop) in zip(texts, itertools.pairwise(stream.borders), strict=True)
    ]
    scored = [(data, ids) for data, ids in parts if len(ids) > 1]
    read = windows.held_out_packed if config.packing == "packed" else windows.held_out_windows
    return HeldOut(
        text=text,
        num_tokens=num_tokens,
        num_bytes=sum(len(data) - tokenizer.num_bytes(ids[:1]) for data, ids in scored),
        encodes_text=all(tokenizer.encodes(data, ids) for data, ids in scored),
        num_unknown=sum(tokenizer.num_unknown(ids[1:]) for _, ids in scored),
        batches=read(stream, config.sequence_length, rows=rows),
    )


def _tokenizer_digest(tokenizer: Tokenizer, train: TokenStream) -> str:
    """SHA-256 of a tokenizer's record, and of the ids that it makes of the training text.

    The ids also change where another version of a tokenizer's package reads the record differently.
    """
    total = hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode())
    total.update(np.ascontiguousarray(train.ids))
    return total.hexdigest()


def _description(config: DataConfig, corpus: Corpus, digest: str, tokenizer: Tokenizer) -> str:
    def size(documents: tuple[Document, ...]) -> str:
        count, total = len(documents), sum(len(document.data) for document in documents)
        return f"{count} document{'s' * (count > 1)}, {total:,} bytes"

    return (
        f"{config.dataset or config.source}: {size(corpus.train)} to train on; "
        f"{size(corpus.valid)} held out; {tokenizer.name}, vocabulary {tokenizer.vocab_size:,}; "
        f"sha256 {digest[:16]}"
    )
