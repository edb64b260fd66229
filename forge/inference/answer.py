"""Answers of a model to prompts given as JSON: texts, labels with probabilities, or embeddings, whatever its kind.

A prompt is a string or an object: `{"prompt": TEXT}` (or `text`, `source`), `{"messages": [...], "tools": [...]}`
for a chat model, `{"text": TEXT, "pair": TEXT}` for a classifier of pairs, `{"ids": [...]}` with token ids. An
object may have an `id`, which its answer repeats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from forge.data.conversations import Conversation, is_list, message_list, message_of, tools_of
from forge.errors import ArgumentError, DataError
from forge.foreign import from_record
from forge.inference.encode import Text, classify, embed
from forge.inference.generate import generate
from forge.inference.loaded import Dtype, LoadedModel, load
from forge.inference.sampling import Generation, SamplingParams

_TEXT_KEYS = ("prompt", "text", "source")
_KEYS = {*_TEXT_KEYS, "messages", "tools", "pair", "ids", "id"}
_SAMPLED = {"temperature": 0.8, "top_k": 50}
"""How a causal language model samples unless the caller says otherwise; an encoder-decoder takes the likeliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerConfig:
    """The model and how it answers; JSON values only."""

    source: str
    """A folder as of `forge.inference.loaded.load`."""
    step: int | str | None = None
    ema: bool = False
    dtype: Dtype = "fp32"
    chat: bool = False
    """Render prompts with the chat template, as a turn of the user."""
    system: str | None = None
    """The system message before each conversation."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`; others have their defaults, but for temperature and top_k."""


class Answerer:
    """Loads a model and answers prompts with it; a function of a shard map (`forge.runtime.shard_map`)."""

    def __init__(self, config: AnswerConfig) -> None:
        """Raises: as `load`; ArgumentError for sampling out of range, or what the model cannot do."""
        self.config = config
        self.loaded = load(config.source, step=config.step, ema=config.ema, dtype=config.dtype)
        self.sampling = sampling_of(config.sampling, loaded=self.loaded)
        is_asked = config.chat or config.system is not None
        if is_asked and self.loaded.kind not in ("causal-lm", "reward"):
            raise ArgumentError(
                f"{self.loaded.name} is a {self.loaded.kind} model, which has no conversations; leave out --chat "
                "and --system, and give the text as the prompt"
            )
        if is_asked:
            self.loaded.require_chat()

    def __call__(self, inputs: Sequence[Any], *, report: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """Answer prompts, in order. Raises: DataError naming the prompt that cannot be used."""
        prompts = [self._prompt(record, number=number) for number, record in enumerate(inputs)]
        kind = self.loaded.kind
        if kind in ("causal-lm", "seq2seq"):
            answers = self._texts(prompts, report=report)
        elif kind == "embedding":
            answers = [
                {"embedding": [float(value) for value in one]} for one in embed(self.loaded, _plain(prompts))
            ]
        elif kind == "masked-lm":
            raise ArgumentError(
                f"{self.loaded.name} is a masked language model, which neither continues a text nor embeds one. "
                "Export it (forge checkpoints export) for transformers' fill-mask pipeline, or train it further "
                "with training.objective: contrastive or classification"
            )
        else:
            answers = [_without_none(asdict(one)) for one in classify(self.loaded, prompts)]
        ids = [{"id": record["id"]} if isinstance(record, Mapping) and "id" in record else {} for record in inputs]
        return [{**own, **answer} for own, answer in zip(ids, answers, strict=True)]

    def _texts(self, prompts: Sequence[Any], *, report: Callable[[], None]) -> list[dict[str, Any]]:
        found: dict[int, list[Generation]] = defaultdict(list)
        for made in generate(self.loaded, prompts, self.sampling):
            found[made.index].append(made)
            report()
        answers = []
        for index in range(len(prompts)):
            texts = [_described(one) for one in sorted(found[index], key=lambda one: one.number)]
            answers.append(texts[0] if len(texts) == 1 else {"texts": texts})
        return answers

    def _prompt(self, record: Any, *, number: int) -> Any:
        try:
            return self._read(record)
        except ValueError as error:
            raise DataError(f"prompt {number + 1}: {error}") from None

    def _read(self, record: Any) -> Text | list[int]:
        """What the model is given. Raises: ValueError."""
        fields_of: dict[str, Any] = {"prompt": record} if isinstance(record, str) else record
        check_record(fields_of)
        if fields_of.get("ids") is not None:
            if max(fields_of["ids"]) >= self.loaded.text_tokenizer.vocab_size:
                raise ValueError(f"the tokenizer has {self.loaded.text_tokenizer.vocab_size} ids, from 0 on")
            return list(fields_of["ids"])
        if "messages" in fields_of or is_list(fields_of.get("prompt")):
            key = "messages" if "messages" in fields_of else "prompt"
            return self._conversation(message_list(fields_of[key], key=key), tools=fields_of.get("tools"))
        text = next(fields_of[key] for key in _TEXT_KEYS if key in fields_of)
        if self.config.chat or self.config.system is not None:
            return self._conversation([message_of(text, role="user")], tools=fields_of.get("tools"))
        return (text, fields_of["pair"]) if "pair" in fields_of else str(text)

    def _conversation(self, messages: Sequence[Mapping[str, Any]], *, tools: Any) -> list[int]:
        system = self.config.system
        if system is not None and messages and messages[0]["role"] != "system":
            messages = [message_of(system, role="system"), *messages]
        return self.loaded.encode_chat(Conversation(messages=tuple(messages), tools=tools_of(tools)))


def check_record(record: Any) -> None:
    """Raises: ValueError unless a JSON value is a prompt."""
    if isinstance(record, str):
        return
    if not isinstance(record, Mapping):
        raise ValueError("a prompt must be a string or an object")
    unknown = sorted(set(record) - _KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r:.80}; the keys of a prompt are {', '.join(sorted(_KEYS))}")
    given = [key for key in (*_TEXT_KEYS, "messages", "ids") if key in record]
    if len(given) != 1:
        raise ValueError(
            f"give one of {', '.join(_TEXT_KEYS)}, messages or ids; it has {', '.join(given) or 'none'}"
        )
    value = record[given[0]]
    if given[0] in ("text", "source") and not isinstance(value, str):
        raise ValueError(f"{given[0]!r} must be a string")
    if given[0] == "prompt" and not isinstance(value, str) and not is_list(value):
        raise ValueError("'prompt' must be a string or a list of messages")
    if given[0] == "ids" and not (is_list(value) and value and all(type(one) is int and one >= 0 for one in value)):
        raise ValueError("'ids' must be a list of token ids")
    if not isinstance(record.get("pair", ""), str):
        raise ValueError("'pair' must be a string")


def sampling_of(given: Mapping[str, Any], *, loaded: LoadedModel) -> SamplingParams:
    """The sampling that a caller gives, over the defaults of the model's kind. Raises: ArgumentError."""
    is_greedy = loaded.kind == "seq2seq" or given.get("num_beams", 1) != 1 or "temperature" in given
    defaults = {} if is_greedy else _SAMPLED
    try:
        return from_record(SamplingParams, {**defaults, **given})
    except ValueError as error:
        raise ArgumentError(f"sampling: {error}") from None


def _plain(prompts: Sequence[Any]) -> list[str]:
    wrong = next((one for one in prompts if not isinstance(one, str)), None)
    if wrong is not None:
        raise ArgumentError("an embedding model reads one text, neither a conversation nor a pair")
    return list(prompts)


def _described(made: Generation) -> dict[str, Any]:
    found = _without_none(asdict(made))
    for key in ("index", "number", "token_ids"):
        del found[key]
    if not made.cut_tokens:
        del found["cut_tokens"]
    return found


def _without_none(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}
