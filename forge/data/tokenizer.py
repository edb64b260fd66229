"""Encode text as little-endian token ids, with a byte-level BPE trained on the corpus or a loaded tokenizer.

Encoding spends most of its time on splitting text and on words that it has seen before. With a GPT-2 style
tokenizer the ids of a text are the concatenated ids of its words, so the text is split by Python's `re` and each
word is looked up in a cache; only new words reach the tokenizer. Other tokenizers encode whole texts on all cores.

The name of a special token inside a text ("<|endoftext|>" in the source of a tokenizer, say) is encoded as ordinary
characters, so that the end-of-text token marks the end of a document and nothing else; with `data.special_tokens:
tokens` it is encoded as that token.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from forge.data.store import token_dtype
from forge.data.tokenizer_backend import open_backend, tokenizer_errors, without_endless_words
from forge.data.tokenizer_files import (
    CLS_TOKEN,
    EOT_TOKEN,
    MAX_JSON_BYTES,
    ROLES,
    SEP_TOKEN,
    TEMPLATE,
    bert_template,
    find_eot_token,
    further_files,
    further_templates,
    other_format,
    read_json,
    set_special_tokens,
)
from forge.data.word_pattern import word_pattern
from forge.environment import looked_in
from forge.errors import DataError
from forge.foreign import lfs_problem
from forge.fs import leads_to_file, leads_to_folder

MAX_VOCABULARY = 1 << 24
"""Published models have up to a million tokens."""

_MAX_WORDS = 1 << 18
"""Size of the word cache; about 50 MB. It is cleared when full; frequent words soon return to it."""

_HELP_FROM_CHARS = 1 << 22
"""Text after which helpers start: a second of work for one process. A helper takes 0.3 s to start."""

_MAX_WORD_CHARS = 64
"""Longer words are rarely repeated and are not cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokenizer:
    """A tokenizer as data: the content of its `tokenizer.json`, and what ends a document.

    `config` is the content of `tokenizer_config.json`, which transformers reads beside it.
    """

    content: str
    config: str
    eot_token: str
    eot_id: int
    vocab_size: int
    """Largest id + 1: the rows an embedding needs."""
    special_tokens: Literal["text", "parse"] = "text"
    """`data.special_tokens`: how the names of special tokens inside a text are encoded."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Further files of a loaded tokenizer, by name: chat template and special tokens, kept for the export."""

    @property
    def dtype(self) -> str:
        return token_dtype(self.vocab_size)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (), adds_end: bool = False
) -> TextTokenizer:
    """Train a byte-level BPE: GPT-2's word pattern, all 256 bytes, end of text as id 0, then `special_tokens`.

    With [CLS] and [SEP] among them, it has BERT's template for a text and for a pair of texts.

    The same texts give the same tokenizer. A small sample may give fewer than `vocab_size` entries,
    because pairs seen once are not merged.

    Args:
        adds_end: whether transformers' tokenizer, when it is called, puts the end of text after it, as T5's does.

    Source: Sennrich et al., arXiv 1508.07909; Radford et al., GPT-2, 2019, section 2.2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOT_TOKEN, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(without_endless_words(texts), trainer)
    if {CLS_TOKEN, SEP_TOKEN} <= set(special_tokens):
        tokenizer.post_processor = bert_template(tokenizer)
    elif adds_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOT_TOKEN}", special_tokens=[(EOT_TOKEN, tokenizer.token_to_id(EOT_TOKEN))]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOT_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    config |= {role: token for role, token in ROLES.items() if token in special_tokens}
    return _described(tokenizer, eot_token=EOT_TOKEN, config=json.dumps(config, indent=2))


def load_tokenizer(location: str) -> TextTokenizer:
    """Load a `tokenizer.json`, or the folder that holds one.

    The end-of-text token is `eos_token` of tokenizer_config.json or special_tokens_map.json, else the
    first of the common names that the vocabulary has.

    Raises: DataError if there is no such file, it is no tokenizer, or nothing says which token ends a text.
    """
    given = Path(location).expanduser()
    path = given / "tokenizer.json" if leads_to_folder(given) else given
    if (other := other_format(given)) is not None:
        raise DataError(
            f"data.tokenizer.from_pretrained: {other} is a tokenizer of another format (SentencePiece, tiktoken, "
            'or a list of words), and there is no tokenizer.json; convert it once: python -c "from transformers '
            f"import AutoTokenizer; AutoTokenizer.from_pretrained('{other.parent}').save_pretrained('NEW_FOLDER')\""
        )
    if not leads_to_file(path):
        raise DataError(
            f"data.tokenizer.from_pretrained: {path} does not exist{looked_in(path)}. Give a tokenizer.json or its "
            "folder; one from the Hub: hf download ORG/NAME --include 'tokenizer*' --local-dir FOLDER"
        )
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"it has {path.stat().st_size} bytes")
        if (pointer := lfs_problem(path)) is not None:
            raise DataError(pointer)
        tokenizer = open_backend(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, DataError) as error:
        raise DataError(f"data.tokenizer.from_pretrained: {path} is not a tokenizer: {error}") from None
    config = read_json(path.with_name("tokenizer_config.json"))
    eot_token = find_eot_token(tokenizer, config=config, folder=path.parent)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config["eos_token"] = config.get("eos_token") or eot_token
    files = further_files(path.parent)
    templates = further_templates(path.parent)
    if templates:
        default = files.pop(TEMPLATE, None)
        templates = ([] if default is None else [{"name": "default", "template": default}]) + templates
        config["chat_template"] = templates
    described = _described(tokenizer, eot_token=eot_token, config=json.dumps(config, indent=2, ensure_ascii=False))
    return replace(described, files=files)


def special_token_names(location: str | None) -> tuple[str, ...]:
    """The names of the special tokens of a tokenizer; None is one that forge trains.

    Raises: DataError as `load_tokenizer`.
    """
    if location is None:
        return (EOT_TOKEN,)
    tokenizer = load_tokenizer(location)
    named = (str(token["content"]) for token in json.loads(tokenizer.content)["added_tokens"] if token["special"])
    return tuple(dict.fromkeys([tokenizer.eot_token, *named]))


def parse_tokenizer(tokenizer: TextTokenizer) -> Tokenizer:
    """Build the tokenizer of the library, which follows the rule of `data.special_tokens`."""
    with tokenizer_errors():
        backend = Tokenizer.from_str(tokenizer.content)
    set_special_tokens(backend, eot_token=tokenizer.eot_token, special_tokens=tokenizer.special_tokens)
    return backend


def _described(tokenizer: Tokenizer, *, eot_token: str, config: str) -> TextTokenizer:
    # Drop a tokenizer.json's truncation and padding, which are settings of one model's input.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values())
    if largest >= MAX_VOCABULARY:  # to write one takes memory for every id below the largest
        raise DataError(f"the tokenizer has a token with the id {largest}; forge reads ids below {MAX_VOCABULARY}")
    content = json.loads(tokenizer.to_str())
    content["model"].pop("dropout", None)
    return TextTokenizer(
        content=json.dumps(content, ensure_ascii=False, indent=2),
        config=config,
        eot_token=eot_token,
        eot_id=vocabulary[eot_token],
        vocab_size=largest + 1,
    )


class Encoder:
    """Encodes texts, each by itself; no text can contain the end-of-text id.

    `words` is what it remembers; None where it encodes whole texts.

    Raises: DataError from `encode` if the tokenizer turns ordinary characters into its end-of-text token, or fails.
    """

    def __init__(self, tokenizer: TextTokenizer, *, words: Mapping[str, bytes] | None = None) -> None:
        self._tokenizer = tokenizer
        self._backend = parse_tokenizer(tokenizer)
        self._is_text = tokenizer.special_tokens == "text"
        is_wordwise = self._is_text and _is_wordwise(json.loads(self._backend.to_str()))
        self.words = _Words(self, known=words or {}) if is_wordwise else None

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as little-endian bytes of the tokenizer's dtype."""
        if self.words is not None:
            split, lookup = word_pattern().findall, self.words.__getitem__
            return [b"".join(map(lookup, split(text))) for text in texts]
        with tokenizer_errors():
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._packed(text, ids=found.ids) for text, found in zip(texts, encodings, strict=True)]

    def encode_word(self, word: str) -> bytes:
        """The ids of one text, not remembered."""
        return self._packed(word, ids=self._ids(word))

    def _packed(self, text: str, *, ids: list[int]) -> bytes:
        if self._is_text and self._tokenizer.eot_id in ids:
            ids = self._ids_without_eot(text)
        return np.array(ids, dtype=self._tokenizer.dtype).tobytes()

    def _ids(self, text: str) -> list[int]:
        with tokenizer_errors():
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _ids_without_eot(self, text: str) -> list[int]:
        """Encode a text with every occurrence of the end-of-text token's name split in two."""
        token = self._tokenizer.eot_token
        head, *rest = text.split(token)
        torn = [head] + [part for after in rest for part in (token[:1], token[1:] + after)]
        ids = [i for part in torn for i in self._ids(part)]
        if self._tokenizer.eot_id in ids:
            raise DataError(
                f"the tokenizer turns ordinary text into its end-of-text token {token!r} (at {text[:80]!r});"
                " choose another eos_token, one that text does not spell"
            )
        return ids


def encode_batches(
    batches: Iterable[Sequence[str]], *, tokenizer: TextTokenizer, num_processes: int
) -> Generator[list[bytes], None, None]:
    """Encode batch after batch, in order; each result as of `Encoder.encode`.

    After `_HELP_FROM_CHARS` characters, `num_processes` helpers encode, with at most three batches queued for each.
    None are started on a single core, or if whole texts are encoded: Rust threads use all cores then.

    Raises: DataError as `Encoder.encode`, or if a helper dies.
    """
    encoder = Encoder(tokenizer)
    num_chars, remaining = 0, iter(batches)
    for texts in remaining:
        yield encoder.encode(texts)
        num_chars += sum(map(len, texts))
        if num_chars > _HELP_FROM_CHARS and num_processes > 1 and encoder.words is not None:
            break
    else:
        return
    pending: deque[Future[list[bytes]]] = deque()
    with closing(_Helpers(tokenizer, words=dict(encoder.words or {}), count=num_processes)) as helpers:
        for texts in remaining:
            pending.append(helpers.submit(texts))
            if len(pending) > 3 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Helpers:
    """Processes that encode text, each driven by a thread of this process.

    They communicate over pipes and are started without multiprocessing, which would import the caller's main module
    again. A helper ends when its pipe is closed, so it does not outlive this process.
    """

    def __init__(self, tokenizer: TextTokenizer, *, words: dict[str, bytes], count: int) -> None:
        greeting = pickle.dumps((tokenizer, words))
        self._threads = ThreadPoolExecutor(count)
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-P", "-c", "from forge.data.tokenizer import serve; serve()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            for _ in range(count):
                # A session of its own, so that Ctrl-C reaches this process alone.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
                )
                self._processes.append(process)
                self._threads.submit(self._greet, process, greeting)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill all helpers."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def submit(self, texts: Sequence[str]) -> Future[list[bytes]]:
        return self._threads.submit(self._ask, texts)

    def _greet(self, process: subprocess.Popen[bytes], greeting: bytes) -> None:
        assert process.stdin
        with suppress(OSError):  # if it has died, `_ask` reports it
            process.stdin.write(greeting)
            process.stdin.flush()
        self._idle.put(process)

    def _ask(self, texts: Sequence[str]) -> list[bytes]:
        process = self._idle.get()
        assert process.stdin and process.stdout
        try:
            pickle.dump(texts, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            process.kill()
            raise DataError(f"a process that encodes text died ({process.wait()}); out of memory?") from None
        finally:
            self._idle.put(process)
        if isinstance(answer, DataError):
            raise answer
        return list(answer)


def serve() -> None:
    """Run a helper: read a tokenizer and known words, then batches, from stdin, and write ids to stdout."""
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        tokenizer, words = pickle.load(sys.stdin.buffer)
        encoder = Encoder(tokenizer, words=words)
        while True:
            try:
                answer: object = encoder.encode(pickle.load(sys.stdin.buffer))
            except DataError as error:
                answer = error
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()


class _Words(dict[str, bytes]):
    """Cache of word → ids; a missing word is encoded and added."""

    def __init__(self, encoder: Encoder, *, known: Mapping[str, bytes]) -> None:
        super().__init__(known)
        self._encoder = encoder

    def __missing__(self, word: str) -> bytes:
        ids = self._encoder.encode_word(word)
        if len(word) <= _MAX_WORD_CHARS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _is_wordwise(content: dict[str, Any]) -> bool:
    """Whether the ids of a text are the concatenated ids of its GPT-2 words, as with plain byte-level BPE.

    Special added tokens are never matched in text (`encode_special_tokens`); other added tokens would be.
    """
    pre_tokenizer = content["pre_tokenizer"] or {}
    return (
        content["model"]["type"] == "BPE"
        and content["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space", True)
        and all(token["special"] for token in content["added_tokens"])
    )
