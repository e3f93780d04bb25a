"""The data of a run, from text to batches for training and to held-out text for scoring.

A `DataConfig` becomes `Data`: the tokenizer, an endless stream of training batches that can be
resumed, and one pass over each held-out split. A loss in bits per byte is
nats / (ln 2 * num_bytes).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from race_jax.data import windows
from race_jax.data.config import PACKINGS, DataConfig
from race_jax.data.documents import Corpus, Document
from race_jax.data.rows import UnreadRows
from race_jax.data.sources import load_corpus, refuse_ignored, the_file
from race_jax.data.token_file import TokenFile, open_token_file
from race_jax.data.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer
from race_jax.data.windows import Batch, Pieces, TokenStream
from race_jax.records import at_least, one_of


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A held-out split.

    Attributes:
        text: the bytes of the split, with documents joined as in the training text. A run may
            compress them by `xz`, for comparison with the model. None if a token file does not have
            the text.
        num_tokens: the number of tokens that are scored, which is the sum of all weights. The first
            token of the stream, or of each packed document, is not scored, because nothing comes
            before it.
        num_bytes: the bytes of documents that the scored tokens stand for. Separators between
            documents are scored, but are no bytes of a document.
        encodes_text: whether it is certain that each document can be recovered from its tokens. If
            not, a loss in bits per byte of text has no meaning.
        num_unknown: how many of the scored tokens are `<unk>`.
        batches: one pass in a fixed order. The last batch is filled up with rows of weight 0.
    """

    text: bytes | memoryview | None
    num_tokens: int
    num_bytes: int
    encodes_text: bool
    num_unknown: int
    batches: grain.IterDataset[Batch | UnreadRows]


@dataclasses.dataclass(frozen=True)
class Data:
    """What a training run reads.

    A batch is a dict of arrays (B, T): `inputs` and `targets` in the dtype of the ids (uint8,
    uint16 or int32), `weights` in uint8 (0 at tokens that are not scored, else 1) and, if documents
    are packed, `segment_ids` in int32 (1, 2, … for the documents of a row, and 0 for its empty
    tail).

    Attributes:
        tokenizer: it turns text into ids and back.
        train: endless training batches. The state of an iterator is a small dict of JSON values
            that counts the batches handed out. In any process that has built the same data, the
            state continues with the very next batch, also with another `num_workers`.
        valid, test: the held-out splits. `test` may be None.
        num_train_tokens: the tokens of one epoch.
        digest: the SHA-256 of all text. Losses can be compared only if the digests are equal.
        tokenizer_digest: the SHA-256 of the tokenizer and of the token ids of the training text.
        description: one line for the log, with the source, the sizes and the digest.
    """

    tokenizer: Tokenizer
    train: grain.IterDataset[Batch | UnreadRows]
    valid: HeldOut
    test: HeldOut | None
    num_train_tokens: int
    digest: str
    tokenizer_digest: str
    description: str

    @property
    def digests(self) -> dict[str, str]:
        """The digests of everything that decides what is learned. A resumed run compares them."""
        return {"the training text": self.digest, "the tokenizer": self.tokenizer_digest}

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self.tokenizer.vocab_size


def build_data(config: DataConfig, *, batch_size: int, seed: int, unread: bool = False) -> Data:
    """Reads, tokenizes and cuts the text of a run. Every fault of the text is found here.

    Training windows follow each other from an offset that changes with the epoch. They are read in
    shuffled order, and an epoch uses each token about once. Held-out windows of T + 1 tokens
    overlap by one token, so that each token except the first of the split is scored exactly once.
    With packing, whole documents share a row, and each is a segment of its own. Documents that are
    longer than a row are first cut into such windows.

    Args:
        config: the source, splits, tokenizer, packing, and `sequence_length` T.
        batch_size: the rows of a batch, at least 1.
        seed: the seed of the order of the training windows, in [0, 2**32).
        unread: whether batches are `UnreadRows`, of which a process reads what it needs. Rows of
            packed documents, of other processes (`num_workers`), and held-out rows of a text are
            read all the same.

    Returns:
        The data. All ids are kept in memory, in one byte per token if there are at most 256 ids;
        those of the source "tokens" stay on the disk.

    Raises:
        ValueError: a file or a field is unusable, the text is shorter than one window, or the
            held-out text has a word or character that the vocabulary lacks. The error names the
            file or the field.
        ImportError: an optional package is missing. The error says which extra to install.

    Example:
        >>> data = build_data(DataConfig(sequence_length=8), batch_size=2, seed=0)
        >>> batch = next(iter(data.train))
        >>> batch["inputs"].shape, bool((batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all())
        ((2, 8), True)

    Source: beyond the paper.
    """
    one_of("config.data.packing", config.packing, PACKINGS)
    at_least("config.data.sequence_length", config.sequence_length, 1)
    config.validate_workers()
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    at_least("batch_size", batch_size, 1)
    if config.source == "tokens":
        return _stored_data(config, batch_size, seed, unread)
    corpus = _divided(load_corpus(config), config)
    tokenizer = build_tokenizer(config, _vocabulary_texts(corpus, config))
    train = _stream(_encode(corpus.train, tokenizer), tokenizer, config)
    _check_length(corpus.train, train, config)
    digest = corpus.digest()
    return Data(
        tokenizer=tokenizer,
        train=_training_batches(train, config, batch_size, seed, unread),
        valid=_held_out(corpus.valid, tokenizer, config, batch_size),
        test=_held_out(corpus.test, tokenizer, config, batch_size) if corpus.test else None,
        num_train_tokens=len(train.ids),
        digest=digest,
        tokenizer_digest=_tokenizer_digest(tokenizer, train),
        description=_description(config, corpus, digest, tokenizer),
    )


def _stored_data(config: DataConfig, batch_size: int, seed: int, unread: bool) -> Data:
    """Returns the data of token files."""
    train_file = open_token_file(the_file(config, "train_files"))
    others = {
        name: open_token_file(the_file(config, field))
        for name, field in (("valid", "valid_files"), ("test", "test_files"))
        if getattr(config, field)
    }
    tokenizer = train_file.tokenizer
    _check_alike(train_file, others)
    if config.tokenizer != tokenizer.name:
        raise ValueError(
            f"config.data.tokenizer must be that of {train_file.path}, {tokenizer.name!r}, got "
            f"{config.tokenizer!r}"
        )
    ids, length = train_file.ids, config.sequence_length
    kept = len(ids) if "valid" in others else math.ceil(len(ids) * (1 - config.valid_fraction))
    if kept <= length:
        raise ValueError(
            f"{train_file.path}: {kept} tokens to train on are fewer than the {length + 1} of one "
            f"window; give more, or lower config.data.sequence_length={length}"
        )

    def held_out(file: TokenFile, ids: np.ndarray) -> HeldOut:
        if len(ids) < 2:
            raise ValueError(f"{file.path}: two held-out tokens are needed, got {len(ids)}")
        batches = windows.held_out_windows(
            TokenStream(ids, np.array([0, len(ids)])),
            length,
            batch_size=batch_size,
            check=file.check if unread else None,
        )
        return _scored_ids(tokenizer, ids, batches)

    valid = others.get("valid", train_file)
    digests = [file.digest for file in (train_file, *others.values())]
    digest = hashlib.sha256(json.dumps([digests, kept]).encode()).hexdigest()
    return Data(
        tokenizer=tokenizer,
        train=windows.train_windows(
            ids[:kept],
            length,
            batch_size=batch_size,
            seed=seed,
            check=train_file.check if unread else None,
        ),
        valid=held_out(valid, valid.ids[0 if "valid" in others else kept :]),
        test=held_out(others["test"], others["test"].ids) if "test" in others else None,
        num_train_tokens=kept,
        digest=digest,
        tokenizer_digest=hashlib.sha256(
            json.dumps(tokenizer.to_dict(), sort_keys=True).encode()
        ).hexdigest(),
        description=f"{train_file.path}: {kept:,} tokens to train on, "
        + ("read from the disk when they are needed; " if unread else "")
        + f"{tokenizer.name}, vocabulary {tokenizer.vocab_size:,}; sha256 {digest[:16]}",
    )


def _check_alike(train_file: TokenFile, others: dict[str, TokenFile]) -> None:
    """Raises ValueError unless all token files have one tokenizer and one dtype."""
    for file in others.values():
        if file.tokenizer.to_dict() != train_file.tokenizer.to_dict():
            raise ValueError(f"{file.path} and {train_file.path} were made by different tokenizers")
        if file.ids.dtype != train_file.ids.dtype:
            raise ValueError(
                f"{file.path} holds ids in {file.ids.dtype}, and {train_file.path} in "
                f"{train_file.ids.dtype}; write both in one, as scripts/write_tokens.py --like does"
            )


def _scored_ids(tokenizer: Tokenizer, ids: np.ndarray, batches: grain.IterDataset) -> HeldOut:
    """Returns a held-out split of ids whose text is no longer there. Bytes stay on the disk.

    The text is that of the ids if no text loses anything by this tokenizer. Words do not say what
    white space was between them.
    """
    if isinstance(tokenizer, ByteTokenizer):
        text = memoryview(ids.astype(np.uint8, copy=False))
    else:
        text = tokenizer.decode(ids).encode("utf-8")
    num_unknown = tokenizer.num_unknown(ids[1:])
    encodes_text = tokenizer.keeps_text and not num_unknown
    return HeldOut(
        text=text if encodes_text else None,
        num_tokens=len(ids) - 1,
        num_bytes=tokenizer.num_bytes(ids) - tokenizer.num_bytes(ids[:1]),
        encodes_text=encodes_text,
        num_unknown=num_unknown,
        batches=batches,
    )


def _divided(corpus: Corpus, config: DataConfig) -> Corpus:
    """Returns the corpus with its files divided into documents, if there is a separator."""
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
    """Yields the training texts, and the separator if documents are joined by it."""
    yield from (document.text() for document in corpus.train)
    joins = any(len(split) > 1 for split in (corpus.train, corpus.valid, corpus.test))
    if joins and config.packing == "contiguous":
        yield Tokenizer.separator


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns the ids of each document."""
    return [_encode_document(document, tokenizer) for document in documents]


def _stream(encoded: list[np.ndarray], tokenizer: Tokenizer, config: DataConfig) -> TokenStream:
    """Returns the ids of a split.

    With packing the documents stay apart. Otherwise the separator joins them.
    """
    if config.packing == "packed" or len(encoded) == 1:
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
    """Raises ValueError if the training text does not fill one window."""
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
    stream: TokenStream, config: DataConfig, batch_size: int, seed: int, unread: bool
) -> grain.IterDataset[Batch | UnreadRows]:
    length = config.sequence_length
    if config.packing == "packed":
        return windows.train_packed(stream, length, batch_size=batch_size, seed=seed)
    return windows.train_windows(
        stream.ids,
        length,
        batch_size=batch_size,
        seed=seed,
        num_workers=config.num_workers,
        check=(lambda: None) if unread and not config.num_workers else None,
    )


def _held_out(
    documents: Sequence[Document], tokenizer: Tokenizer, config: DataConfig, batch_size: int
) -> HeldOut:
    encoded = _encode(documents, tokenizer)
    stream = _stream(encoded, tokenizer, config)
    num_tokens = Pieces(stream, config.sequence_length).num_targets
    if not num_tokens:
        raise ValueError(
            f"{documents[0].name}: the held-out text has no two tokens that follow each other, so "
            "there is nothing to score"
        )
    texts, is_packed = [document.data for document in documents], config.packing == "packed"
    pairs = zip(texts, encoded, strict=True)
    scored = [(data, ids) for data, ids in pairs if not is_packed or len(ids) > 1]
    unscored = [ids[:1] for _, ids in (scored if is_packed else scored[:1])]
    read = windows.held_out_packed if is_packed else windows.held_out_windows
    return HeldOut(
        text=tokenizer.separator.encode().join(texts),
        num_tokens=num_tokens,
        num_bytes=sum(len(tokenizer.counted(data)) for data, _ in scored)
        - sum(map(tokenizer.num_bytes, unscored)),
        encodes_text=all(tokenizer.encodes(data, ids) for data, ids in scored),
        num_unknown=sum(
            tokenizer.num_unknown(ids[1:]) for ids in np.split(stream.ids, stream.borders[1:-1])
        ),
        batches=read(stream, config.sequence_length, batch_size=batch_size),
    )


def _tokenizer_digest(tokenizer: Tokenizer, train: TokenStream) -> str:
    """Returns the SHA-256 of a tokenizer's record and of its ids of the training text.

    The ids are included because another version of a tokenizer's package may read the same record
    differently.
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
