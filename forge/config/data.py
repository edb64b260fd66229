"""`data:` which text is read, how it is tokenized, and in which order it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from forge.config.class_names import FormatName, SourceName
from forge.config.classification import LabelsSpec
from forge.config.embedding import EmbeddingSpec
from forge.config.mixture import MAX_PARTS, FileType, MixtureParts, mixture_problems, origin_problems
from forge.config.section import Count, FieldError, Fraction, Section, Strings, raise_errors, unread_sections
from forge.data.formats.registry import TEMPLATE_FORMATS

BadRecordAction = Literal["fail", "skip"]
_READ_WITH = {
    "chat": TEMPLATE_FORMATS,
    "preference": ("preference",),
    "labels": ("labelled",),
    "pair": ("pair",),
    "embedding": ("embedding",),
}
"""The formats that read a section of `data`."""


class TokenizerSpec(Section):
    """The tokenizer: trained on the corpus, or loaded."""

    train: Literal["bpe"] | None = None
    """`bpe`: train a byte-level BPE tokenizer on a sample of the corpus; the default unless `from_pretrained` is
    given."""

    vocab_size: Count = Field(8192, ge=257, le=2**20)
    """Entries of a trained vocabulary, special tokens included; at least the 256 bytes and the end-of-text token.
    A small corpus may give fewer."""

    special_tokens: Strings = ()
    """Special tokens of a trained tokenizer besides the end-of-text token, such as `[MASK]`; by default those that
    the objective needs."""

    from_pretrained: str | None = Field(None, min_length=1)
    """A `tokenizer.json` file, or a folder that contains one."""

    add_tokens: Strings = ()
    """Special tokens to add to a loaded tokenizer, such as `<tool>`; their ids follow the largest one. If the
    pretrained embedding has no rows for them, set `model.resize_embeddings`. Text spells them only with
    `data.special_tokens: parse`, or in a chat template."""

    @model_validator(mode="after")
    def _adds_each_token_once(self) -> TokenizerSpec:
        wrong = [token for token in self.add_tokens if not token.strip() or self.add_tokens.count(token) > 1]
        if wrong:
            raise FieldError("add_tokens", f"must be different texts, not {wrong[0]!r}")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerSpec:
        if self.train and self.from_pretrained:
            raise ValueError("give either 'train' or 'from_pretrained', not both")
        # Compared with the default, not asked whether it was written: a plan's copy of the job writes it.
        if self.from_pretrained and self.vocab_size != type(self).model_fields["vocab_size"].default:
            raise FieldError("vocab_size", "is only for trained tokenizers; a loaded one has its own")
        if self.from_pretrained and self.special_tokens:
            raise FieldError("special_tokens", "is only for trained tokenizers; a loaded one has its own")
        return self


class ChatSpec(Section):
    """What is learnt of conversations; only with `format: chat` and, the template alone, `preference`."""

    turns: Literal["all", "last"] = "all"
    """Which turns of the assistant carry loss; nothing else of a conversation does."""

    template: str | None = Field(None, min_length=1)
    """A Jinja file with a chat template in the form of transformers; that of the tokenizer if it is left out."""


class PreferenceSpec(Section):
    """How preference pairs are read; only with `format: preference`."""

    texts: Literal["auto", "chat", "plain"] = "auto"
    """What a pair of texts is. `chat`: a turn of the user and answers of the assistant, in the chat template.
    `plain`: the prompt with each answer right after it, ended by the end-of-text token. `auto`: `chat` if there is
    a template, else `plain`. Lists of messages are always in the chat template."""


class PairSpec(Section):
    """Where a record has its source and its target; only with `format: pair`."""

    source: str = Field("source", min_length=1)
    """The field with the text that the encoder reads; in a table within the record with dots: `translation.en`."""

    target: str = Field("target", min_length=1)
    """The field with the text that the decoder learns to write."""

    prefix: str = Field("", max_length=1000)
    """Text before every source, such as `summarize: `, by which T5 tells tasks apart; `forge generate` adds it
    too."""

    truncation: Literal["none", "source"] = "none"
    """What happens to a pair longer than `seq_len`. `none`: it is a record that cannot be used, see
    `on_bad_record`. `source`: the end of its source is cut; the plan counts how often."""

    @model_validator(mode="after")
    def _are_two(self) -> PairSpec:
        if self.source == self.target:
            raise FieldError("target", "is also the source", depends_on=("source",))
        return self


_WITHOUT_TEXT_KEY = ("chat", "preference", "pair", "embedding")


class DataSpec(Section):
    """The training text: raw text → documents → token shards → the batch of step t."""

    source: SourceName | None = None
    """`python-stdlib`: the Python sources of the running interpreter's standard library, real text that every
    machine has without a download. Give one of `source`, `files`, `dataset` and `mixture`."""

    files: Strings | None = None
    """A glob or fsspec URL, or a list of them: text files (one document each), JSON lines, JSON arrays, CSV or
    Parquet (one document per record); gzip, bzip2, xz, zstd and lz4 are decompressed. Local paths, `s3://`,
    `gs://`, `https://`. Wildcards leave out hidden files, side files of macOS and Jupyter, and empty files; links
    are followed. `forge plan` shows what is read and what is not."""

    dataset: str | None = Field(None, min_length=1)
    """A data set in the layout of the Hugging Face hub: a local folder, or `ORG/NAME` on the hub, for which
    `HF_TOKEN` is taken from the environment. Its Parquet, JSON, CSV or text files are read, none is run."""

    subset: str | None = Field(None, min_length=1)
    """The subset of `dataset`, which its README.md lists as `config_name`; the default one if it is left out."""

    split: str = Field("train", min_length=1)
    """The split of `dataset` that is read; `held_out` is a share of it."""

    revision: str | None = Field(None, pattern=r"^[\w./-]{1,200}$")
    """Branch, tag or commit of `dataset` on the hub; the newest if it is left out."""

    mixture: MixtureParts = Field((), json_schema_extra={"maxItems": MAX_PARTS})
    """Several corpora that are read together, each with a `name` and a `weight`. Every part is prepared by itself,
    held out from, and read in an order of its own, pass after pass; changing a weight prepares nothing again."""

    file_type: FileType = "auto"
    """What `files` are. `auto`: found out from the content and the name of each file; archives, notebooks and other
    files that are no documents are refused. `text`: every file is one document, also one of JSON or CSV."""

    text_key: str = Field("text", min_length=1)
    """The field of a JSON record, or the column of a CSV or Parquet file, that contains the text."""

    on_bad_record: BadRecordAction = "fail"
    """What happens if a record cannot be used: its line is not JSON, its text is missing, a conversation has an
    empty turn. `fail`: nothing is trained, and the first of them and their number are named. `skip`: they are left
    out; the plan shows how many there are, and lists them with file, line and reason."""

    special_tokens: Literal["text", "parse"] = "text"
    """What the name of a special token of the tokenizer means where the text spells it (`<|end|>`). `text`:
    ordinary characters, so that text from elsewhere cannot end a document or fake a turn. `parse`: the special
    token. The same holds for the prompt of `forge generate`."""

    format: FormatName = "text"
    """What a record becomes. `text`: every next token of the text is predicted. `chat`: a conversation in the
    tokenizer's chat template, of which the assistant's turns are predicted; a record has `messages` (or
    `conversations`), `prompt` and `completion`, or `instruction` and `output`. `preference`: two answers to a
    prompt, of which one is preferred: `prompt`, `chosen` and `rejected` as texts or lists of messages, or `chosen`
    and `rejected` that begin with the same prompt. `labelled`: a text, or two, or a list of words, with what a
    classifier says about it (docs/classification.md). `pair`: a source and a target, for translation and summaries;
    `seq_len` is the length of both together, each with its end-of-text token. `embedding`: a query and a text that
    belongs to it, and maybe texts that do not; `seq_len` is the length of all of them together. A class of your own
    gives the examples of each record itself. All but `text` need `packing: examples` or `none`."""

    chat: ChatSpec = ChatSpec()
    """What is learnt of conversations."""

    preference: PreferenceSpec = PreferenceSpec()
    """How preference pairs are read."""

    labels: LabelsSpec = LabelsSpec()
    """The labels of `labelled` records."""

    pair: PairSpec = PairSpec()
    """Sources and targets of `format: pair`."""

    embedding: EmbeddingSpec = EmbeddingSpec()
    """Texts that belong together."""

    packing: Literal["concatenate", "examples", "none"] = "concatenate"
    """How sequences are filled. `concatenate`: documents end to end, separated by an end-of-text token, and cut
    anywhere. `examples`: whole examples share a sequence, and none sees another; a document longer than `seq_len`
    is split, what remains is padding; the default unless the format is `text`. `none`: one example per sequence,
    padded."""

    tokenizer: TokenizerSpec = TokenizerSpec()
    """The tokenizer; that of `model.from_pretrained` where this is set and the key is left out."""

    seq_len: Count = Field(1024, ge=2, le=2**24)
    """Predicted tokens per sequence, padding included."""

    held_out: Fraction = Field(0.01, ge=0, le=0.5)
    """Share of the documents that is not trained on, but used to measure the held-out loss."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of the sample order and of the choice of held-out documents. The order is the same for any number of
    workers."""

    @model_validator(mode="before")
    @classmethod
    def _packing_of_the_format(cls, values: Any) -> Any:
        if isinstance(values, dict) and "packing" not in values and values.get("format", "text") != "text":
            return {**values, "packing": "examples"}
        return values

    @model_validator(mode="after")
    def _one_origin(self) -> DataSpec:
        errors: list[FieldError] = []
        errors += self.unread_sections(changed=True)
        if self.format == "preference" and self.chat.turns != "all":
            problem = "is only for format: chat; of a preference pair the answers carry loss"
            errors.append(FieldError("chat.turns", problem, depends_on=("format",)))
        if self.format in _WITHOUT_TEXT_KEY and self.text_key != "text":
            problem = f"is not read with format: {self.format}, whose fields have names of their own"
            errors.append(FieldError("text_key", problem, depends_on=("format",)))
        if self.packing == "concatenate" and self.format != "text":
            problem = f"must be examples or none with format {self.format}"
            errors.append(FieldError("packing", problem, nearest="examples"))
        errors += [*origin_problems(self), *mixture_problems(self.mixture)]
        origins = {"source": self.source, "files": self.files, "dataset": self.dataset}
        given = [key for key, origin in origins.items() if origin is not None]
        if self.mixture and given:
            problem = f"is instead of {given[0]!r}; make that a part of it"
            errors.append(FieldError("mixture", problem, depends_on=(given[0],)))
        raise_errors(errors)
        if len(given) + bool(self.mixture) != 1:
            raise ValueError("give one of 'source', 'files', 'dataset' and 'mixture'")
        return self

    def unread_sections(self, *, changed: bool = False) -> Iterator[FieldError]:
        """Yield the problems of sections that the format does not read."""
        return unread_sections(self, _READ_WITH, by="format", changed=changed)

    @property
    def parts(self) -> tuple[DataSpec, ...]:
        """The section of each part of the mixture, as if it were given alone."""
        keys = ("source", "files", "dataset", "subset", "split", "revision")
        return tuple(
            self.model_copy(
                update={
                    "mixture": (),
                    **{key: getattr(part, key) for key in keys},
                    "file_type": self.file_type if part.file_type == "auto" else part.file_type,
                    "text_key": part.text_key or self.text_key,
                }
            )
            for part in self.mixture
        )
