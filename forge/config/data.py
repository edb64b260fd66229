"""`data:` which text, which tokens, in which order."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import Count, FieldError, Fraction, Section, Strings


class TokenizerSpec(Section):
    """Where the tokenizer comes from: trained on the corpus, or loaded."""

    train: Literal["bpe"] | None = None
    """`bpe`: train a byte-level BPE tokenizer on a sample of the corpus. The default unless
    `from_pretrained` is given."""

    vocab_size: Count = Field(8192, ge=257)
    """Entries of a trained vocabulary, special tokens included. 257 = the 256 bytes and the end-of-text
    token. A small corpus may give fewer."""

    from_pretrained: str | None = Field(None, min_length=1)
    """A `tokenizer.json`, or a folder that holds one."""

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerSpec:
        if self.train and self.from_pretrained:
            raise ValueError("give either 'train' or 'from_pretrained', not both")
        # Compared with the default, not asked whether it was written: a plan's copy of the job writes it.
        if self.from_pretrained and self.vocab_size != type(self).model_fields["vocab_size"].default:
            raise FieldError("vocab_size", "belongs to a trained tokenizer; a loaded one has its own")
        return self


class DataSpec(Section):
    """Raw text → documents → token shards → the batch of step t."""

    source: Literal["python-stdlib"] | None = None
    """`python-stdlib`: the Python sources of the running interpreter's standard library; real text on
    every machine, without a download. Give `source` or `files`."""

    files: Strings | None = None
    """A glob or fsspec URL, or a list of them: text files (one document each), `.jsonl` (one document a
    line) or `.parquet` (one a row); `.gz` and the like are unpacked. Local paths, `s3://`, `gs://`,
    `https://`."""

    text_key: str = Field("text", min_length=1)
    """The field of a `.jsonl` line, or the column of a `.parquet` file, that holds the text."""

    tokenizer: TokenizerSpec = TokenizerSpec()
    """How text becomes tokens."""

    seq_len: Count = Field(1024, ge=2)
    """Tokens per sequence that are predicted. Documents are packed end to end with an end-of-text token
    between them and cut into sequences of this length."""

    held_out: Fraction = Field(0.01, ge=0, le=0.5)
    """Share of the documents kept from training and used for the held-out loss."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of the sample order and of the choice of held-out documents. The order is the same at every
    number of workers."""

    @model_validator(mode="after")
    def _one_origin(self) -> DataSpec:
        if (self.source is None) == (self.files is None):
            raise ValueError("give either 'source' or 'files'")
        if self.files is not None and not (self.files and all(self.files)):
            raise FieldError("files", "must name at least one file or glob")
        return self
