"""The record that describes the text of a run and how it becomes batches.

Its fields hold plain values. Every error names the field.
"""

import dataclasses

from race_jax.records import at_least, one_of

SOURCES = ("stdlib", "files", "huggingface", "tokens")
TOKENIZERS = ("bytes", "words", "characters", "bpe")
PACKINGS = ("contiguous", "packed")
MAX_WORKERS = 256


@dataclasses.dataclass
class DataConfig:
    """Where the text comes from and how it becomes windows of tokens.

    Attributes:
        source: "stdlib" (the source files of Python's standard library), "files" (local text, plain
            or packed by gzip, bzip2, xz or zip) or "huggingface" (a data set by name, which needs
            the package `datasets`). "hf:NAME" or "hf:NAME:CONFIG" is short for the latter with
            `dataset` and `dataset_config`. "tokens" reads a file of `scripts/write_tokens.py`.
        root: the folder that relative file names start from. None takes the environment variable
            RACE_JAX_DATA, which is used for nothing else.
        train_files, valid_files, test_files: file names, as a tuple or as one comma-separated
            string. They may contain spaces. In a tuple they may also contain commas. A folder
            stands for the files in it, and a name with * or ? for the files that match it.
        dataset, dataset_config, text_field: the names of a Hugging Face data set, of its
            configuration, and of its column of text.
        tokenizer: "bytes", "characters", "words" or "bpe" (byte pairs). The vocabulary of
            characters and words is that of the training split.
        tokenizer_file: the JSON file of a `tokenizers` tokenizer, for "bpe".
        vocab_limit: for "words", the size of the vocabulary, which keeps the most frequent words;
            the others become `<unk>`. For "bpe", the size of a vocabulary that is trained.
        end_of_line: whether each line break becomes the token `<eos>`, for "words".
        packing: "contiguous" cuts one stream of text into windows. "packed" puts whole documents
            side by side in a row, with segment ids.
        document_separator: the text that divides a file into documents, for "packed". With ""
            every file is one document.
        sequence_length: T, the tokens of a window.
        valid_fraction: the share of the text that is held out if there is no validation text. It is
            a share of the files for "stdlib", and of the end of the text otherwise.
        valid_tail: the number of characters that are held out at the end of the text, in place of
            a share. 0 means that the share counts.
        num_workers: the number of processes that read "contiguous" windows, each with a copy of the
            text. With 0 a thread of this process reads. The batches are the same for any number.
    """

    source: str = "stdlib"
    root: str | None = None
    train_files: tuple[str, ...] = ()
    valid_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    dataset: str = ""
    dataset_config: str = ""
    text_field: str = "text"
    tokenizer: str = "bytes"
    tokenizer_file: str | None = None
    vocab_limit: int | None = None
    end_of_line: bool = False
    packing: str = "contiguous"
    document_separator: str = ""
    sequence_length: int = 256
    valid_fraction: float = 0.05
    valid_tail: int = 0
    num_workers: int = 0

    @property
    def is_on_disk(self) -> bool:
        """Whether the data stay on the disk and are read when they are needed."""
        return self.source == "tokens"

    def validate(self) -> None:
        """Raises ValueError naming the first field that cannot be used."""
        self._expand_source()
        one_of("config.data.source", self.source, SOURCES)
        one_of("config.data.tokenizer", self.tokenizer, TOKENIZERS)
        one_of("config.data.packing", self.packing, PACKINGS)
        at_least("config.data.sequence_length", self.sequence_length, 1)
        at_least("config.data.valid_tail", self.valid_tail, 0)
        self.validate_workers()
        if self.vocab_limit is not None:
            at_least("config.data.vocab_limit", self.vocab_limit, 2)
        if not 0 < self.valid_fraction < 1:
            raise ValueError(
                f"config.data.valid_fraction must lie in (0, 1), got {self.valid_fraction}"
            )
        self._validate_source()

    def validate_workers(self) -> None:
        """Raises ValueError if `num_workers` cannot be used."""
        at_least("config.data.num_workers", self.num_workers, 0)
        if self.num_workers > MAX_WORKERS:
            raise ValueError(
                f"config.data.num_workers must be <= {MAX_WORKERS}, got {self.num_workers}"
            )
        if self.num_workers and self.packing == "packed":
            raise ValueError(
                'config.data.num_workers must be 0 with packing="packed", because a row depends on '
                f"all documents before it; got {self.num_workers}. A thread reads ahead in any case"
            )

    def _expand_source(self) -> None:
        """Writes "hf:NAME:CONFIG" as a source, a data set and its configuration."""
        if self.source.startswith("hf:"):
            if self.dataset:
                raise ValueError(
                    f"config.data.source={self.source!r} names a data set, and so does "
                    f"config.data.dataset={self.dataset!r}; give one of the two"
                )
            name, _, configuration = self.source.removeprefix("hf:").partition(":")
            self.source, self.dataset = "huggingface", name
            self.dataset_config = configuration or self.dataset_config

    def _validate_source(self) -> None:
        if self.source in ("files", "tokens") and not self.train_files:
            raise ValueError(
                f'config.data.train_files must name a file for source="{self.source}", got ()'
            )
        if self.source == "tokens":
            self._validate_stored()
        if self.source == "huggingface" and not self.dataset:
            raise ValueError('config.data.dataset must be given for source="huggingface", got ""')
        if self.tokenizer == "bpe" and not self.tokenizer_file and self.source != "tokens":
            raise ValueError(
                'config.data.tokenizer_file must name a tokenizers JSON file for tokenizer="bpe", '
                f"got {self.tokenizer_file}"
            )

    def _validate_stored(self) -> None:
        """Raises ValueError naming a field that has no meaning where ids are on the disk."""
        unused = {
            "tokenizer_file": None,
            "vocab_limit": None,
            "end_of_line": False,
            "packing": "contiguous",
            "document_separator": "",
            "valid_tail": 0,
            "num_workers": 0,
            "dataset": "",
            "dataset_config": "",
        }
        for name, value in unused.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f'config.data.{name} must be {value!r} for source="tokens", whose files hold '
                    f"one stream of ids each; got {getattr(self, name)!r}"
                )
