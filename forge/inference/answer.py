"""Answers of a model to prompts given as JSON (`forge.inference.answer_request`): texts, labels with probabilities,
tokens for masks, or embeddings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from forge.data.conversations import Conversation, message_list, message_of, tools_of
from forge.errors import ArgumentError, DataError
from forge.foreign import from_record
from forge.inference.answer_request import TEXT_KEYS, AnswerConfig, check_record, messages_key, require_known_ids
from forge.inference.encode import Text, classify, embed
from forge.inference.generate import generate
from forge.inference.identity import WRITES
from forge.inference.loaded import LoadedModel, load
from forge.inference.masked import DEFAULT_CANDIDATES, fill_masks, masked_ids, require_masks
from forge.inference.sampling import Generation, SamplingParams

_SAMPLED = {"temperature": 0.8, "top_k": 50, "seed": 1}
"""How a causal language model samples unless the caller says otherwise; an encoder-decoder takes the likeliest."""
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""Fields of `SamplingParams` that say among which tokens one is drawn, with the values that exclude none."""
_READ_PAIRS = ("classification", "token-classification", "reward")


class Answerer:
    """Loads a model and answers prompts with it; a function of a shard map (`forge.runtime.shard_map`)."""

    def __init__(self, config: AnswerConfig) -> None:
        """Raises: as `load`; ArgumentError for wrong sampling, or without effect, or what the model cannot do."""
        self.config = config
        self.loaded = load(config.source, step=config.step, ema=config.ema, dtype=config.dtype)
        _require_effect(config.sampling, loaded=self.loaded)
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
        if kind in WRITES:
            answers = self._texts(prompts, report=report)
        elif kind == "embedding":
            answers = [
                {"embedding": [float(value) for value in one]} for one in embed(self.loaded, _plain(prompts))
            ]
        elif kind == "masked-lm":
            answers = self._masks(prompts)
        else:
            answers = [_without_none(asdict(one)) for one in classify(self.loaded, prompts)]
        ids = [{"id": record["id"]} if isinstance(record, Mapping) and "id" in record else {} for record in inputs]
        return [{**own, **answer} for own, answer in zip(ids, answers, strict=True)]

    def _masks(self, prompts: Sequence[Any]) -> list[dict[str, Any]]:
        count = self.sampling.top_k if "top_k" in self.config.sampling else DEFAULT_CANDIDATES
        filled = fill_masks(self.loaded, prompts, num_candidates=count)
        return [{"masks": [[asdict(one) for one in mask] for mask in masks]} for masks in filled]

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
        is_chat = self.config.chat or self.config.system is not None
        if "pair" in fields_of and self.loaded.kind not in _READ_PAIRS:
            raise ValueError(f"a {self.loaded.kind} model reads one text, and no 'pair'")
        if fields_of.get("tools") and not (is_chat or messages_key(fields_of)):
            raise ValueError("'tools' are for conversations: give messages, or --chat")
        if fields_of.get("ids") is not None:
            require_known_ids(fields_of, vocabulary=self.loaded.text_tokenizer.vocab_size)
            ids = list(fields_of["ids"])
            if self.loaded.kind == "masked-lm":
                require_masks(self.loaded, ids)
            return ids
        key = messages_key(fields_of)
        if key is not None and self.loaded.kind == "masked-lm":
            raise ValueError("a masked language model has no conversations; give a text with its mask token")
        if key is not None:
            return self._conversation(message_list(fields_of[key], key=key), tools=fields_of.get("tools"))
        text = next(fields_of[key] for key in TEXT_KEYS if key in fields_of)
        if is_chat:
            return self._conversation([message_of(text, role="user")], tools=fields_of.get("tools"))
        if self.loaded.kind == "masked-lm":
            return masked_ids(self.loaded, str(text))
        return (text, fields_of["pair"]) if "pair" in fields_of else str(text)

    def _conversation(self, messages: Sequence[Mapping[str, Any]], *, tools: Any) -> list[int]:
        system = self.config.system
        if system is not None and messages and messages[0]["role"] != "system":
            messages = [message_of(system, role="system"), *messages]
        return self.loaded.encode_chat(Conversation(messages=tuple(messages), tools=tools_of(tools)))


def sampling_of(given: Mapping[str, Any], *, loaded: LoadedModel) -> SamplingParams:
    """The sampling that a caller gives, over the defaults of the model's kind. Raises: ArgumentError."""
    writes = loaded.kind in WRITES
    defaults = _SAMPLED if writes and _draws(given, loaded=loaded) else {}
    try:
        return from_record(SamplingParams, {**defaults, **given})
    except ValueError as error:
        raise ArgumentError(f"sampling: {error}") from None


def _draws(given: Mapping[str, Any], *, loaded: LoadedModel) -> bool:
    """Whether tokens are drawn, rather than the likeliest taken, unless the values have another type."""
    is_greedy = loaded.kind == "seq2seq" or given.get("num_beams", 1) != 1
    return bool(given["temperature"]) if "temperature" in given else not is_greedy


def _require_effect(given: Mapping[str, Any], *, loaded: LoadedModel) -> None:
    """Raises: ArgumentError naming fields of the sampling that would change nothing."""
    kind = loaded.kind
    if kind not in WRITES:
        unused = sorted(set(given) - ({"top_k"} if kind == "masked-lm" else set()))
        if unused:
            does = "fills masks" if kind == "masked-lm" else "writes no text"
            raise ArgumentError(f"{loaded.name} is a {kind} model, which {does}: leave out {_listed(unused)}")
        return
    unused = [name for name in _NEUTRAL if given.get(name, _NEUTRAL[name]) != _NEUTRAL[name]]
    if unused and not _draws(given, loaded=loaded):
        raise ArgumentError(
            f"the likeliest token is taken, and none drawn, so {_listed(unused)} would change nothing: give a "
            "temperature above 0 (and no beams), or leave it out"
        )
    if given.get("length_penalty", 1.0) != 1.0 and given.get("num_beams", 1) == 1:
        raise ArgumentError("length_penalty is of beam search; give num_beams, or leave it out")


def _listed(names: Sequence[str]) -> str:
    """Fields of the sampling, as the options of `forge generate` that are called otherwise too."""
    options = {"num_beams": "num_beams (--beams)", "n": "n (-n)"}
    return ", ".join(options.get(name, f"{name} (--{name.replace('_', '-')})") for name in names)


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
