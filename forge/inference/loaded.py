"""Load a model for evaluation, generation or serving: that of a run's checkpoint, or of a transformers folder.

    loaded = load("runs/2026-11-28-chat")          the newest checkpoint that verifies
    loaded = load("exported/", dtype="bf16")       a folder that `from_pretrained` loads

Weights are read from safetensors files only, and code of a folder is never executed. By default the model computes
in fp32, also if its weights are stored in bf16: forge.inference.generate says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from forge.checkpoint.best import open_verified
from forge.checkpoint.storage import open_storage
from forge.code_archive import require_trusted, restore_code
from forge.data.chat_encoder import ChatEncoder
from forge.data.chat_template import ChatTemplate, find_chat_template
from forge.data.conversations import Conversation
from forge.data.text_frame import TextFrame, text_frame
from forge.data.tokenizer import TextTokenizer, load_tokenizer, parse_tokenizer
from forge.environment import expand_home
from forge.errors import ArgumentError, CheckpointError, ForgeError
from forge.foreign import parse_object, read_file
from forge.inference.adapters import load_adapters, merge_adapters
from forge.inference.checkpoint_model import load_model
from forge.inference.identity import KINDS, WRITES, Kind, digest_of, digest_of_folder
from forge.model.auto_classes import AUTO_CLASSES, auto_class_of_config
from forge.model.positions import num_positions
from forge.model.transformers_config import load_config, read_generation
from forge.objective.registry import AutoClass
from forge.plan.plan import Plan
from forge.process import one_line
from forge.runs.reader import read_plan
from forge.user_code import use_code

Dtype = Literal["fp32", "bf16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PROBE = "a"
_MAX_POOLING_BYTES = 2**16
_MAX_TEMPLATE_BYTES = 2**20
_ANY_LENGTH = 1 << 24
"""Tokens of a conversation; the model's own limit is checked where it is used."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, with all that is needed to give it texts and to read what it answers."""

    model: Any
    """A transformers model, or a module of the user's own that returns logits."""
    tokenizer: Tokenizer
    text_tokenizer: TextTokenizer
    """The same as data."""
    name: str
    """Of the run or the folder."""
    kind: Kind
    step: int | None
    """Of the checkpoint; None for a folder."""
    digest: str
    """Of the weights: equal for equal weights in equal files. For caches, and to compare results."""
    max_positions: int | None
    """Most tokens at once; None: no limit is known."""
    end_ids: tuple[int, ...]
    """Any of these tokens ends a generated text."""
    chat_template: ChatTemplate | None
    chat_encoder: ChatEncoder
    """Encodes conversations, if there is a chat template."""
    frame: TextFrame | None
    """What stands around the source of an encoder-decoder; None for other kinds."""
    labels: tuple[str, ...]
    """Names of a classifier's outputs; empty for other kinds, and for numbers."""
    problem_type: str | None
    """What a classifier's outputs mean, in the word of transformers' configs."""
    start_ids: tuple[int, ...]
    """What the decoder of an encoder-decoder begins with; empty for other kinds."""
    before: tuple[int, ...]
    """Tokens that a tokenizer puts before a text to continue, such as the beginning-of-sequence token."""
    max_source: int | None = None
    """Most tokens of the source of an encoder-decoder."""
    prefix: str = ""
    """Text before every source (`data.pair.prefix`)."""
    pooling: Literal["mean", "cls", "last_token"] = "mean"
    """How the embedding of a text is made of the last hidden states."""
    is_normalised: bool = True
    """Whether embeddings have length 1."""

    @property
    def is_transformers(self) -> bool:
        return isinstance(self.model, PreTrainedModel)

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def pad_id(self) -> int:
        """A token for positions that are masked."""
        own = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        return own if isinstance(own, int) and own >= 0 else (self.end_ids or (0,))[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text to continue; of an encoder-decoder those of a source, cut to its limit."""
        if self.kind == "seq2seq":
            return self._source(text)
        if self.kind == "causal-lm":
            # `encode` would stop all other threads, for seconds if the text has megabytes.
            return [*self.before, *self.tokenizer.encode_batch([text], add_special_tokens=False)[0].ids]
        return list(self.tokenizer.encode_batch([text])[0].ids)

    def encode_chat(self, conversation: Conversation) -> list[int]:
        """Token ids of a conversation and of what asks for the next turn of the assistant.

        Raises: ArgumentError if the tokenizer has no chat template; ValueError if the template refuses it.
        """
        self.require_chat()
        return self.chat_encoder.prompt(conversation)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def require_text(self) -> None:
        """Raises: ArgumentError if the model writes no text."""
        if self.kind not in WRITES:
            raise ArgumentError(
                f"{self.name} is a {self.kind} model and writes no text: only a causal language model continues "
                "one, and only an encoder-decoder (seq2seq) writes the target of a source; forge generate gives "
                "labels, rewards and embeddings of the models that have them"
            )

    def require_chat(self) -> None:
        """Raises: ArgumentError if there is no chat template."""
        if self.chat_template is None:
            raise ArgumentError(
                f"{self.name} has no chat template: its tokenizer names none. Give plain prompts, or train with "
                "data.chat.template"
            )

    def require_transformers(self, what: str) -> None:
        """Raises: ArgumentError if the model is a module of the user's own."""
        if not self.is_transformers:
            raise ArgumentError(f"{self.name} is a model of your own class; {what} requires one of transformers")

    def _source(self, text: str) -> list[int]:
        frame = self.frame
        assert frame is not None, "an encoder-decoder has one"
        ids = self.tokenizer.encode(self.prefix + text, add_special_tokens=False).ids
        room = None if self.max_source is None else max(0, self.max_source - frame.num_tokens)
        return list(map(int, frame.around(np.array(ids[:room], dtype=np.int64))))


def load(
    source: str | Path,
    *,
    step: int | str | None = None,
    ema: bool = False,
    dtype: Dtype | None = "fp32",
    device: str | None = None,
    adapters: Sequence[str | Path] = (),
) -> LoadedModel:
    """Load the model of a run folder, or of a folder of transformers, such as `forge checkpoints export` writes.

    Args:
        source: the folder.
        step: of a run: a step or `best`; None: the newest checkpoint that verifies.
        ema: of a run: its averaged (EMA) weights.
        dtype: in which the model computes. With bf16 texts are generated as fast as the machine can, and then
            verified (see `forge.inference.generate`). None: bf16 if the weights are and the device computes in it.
        device: such as `cuda`; None: the GPU if there is one.
        adapters: LoRA adapters that are merged into the weights, one after the other: folders of runs (the newest
            checkpoint) or of peft.

    Raises: CheckpointError if the run has no such checkpoint; ArgumentError if the folder holds neither a run nor a
        model; ModelError, PlanError, DataError if it cannot be used; UserCodeError for code that is not trusted.
    """
    folder = Path(expand_home(str(source)))
    if (folder / "plan.json").is_file():
        found = _load_run(folder, step=step, ema=ema)
    elif step is not None or ema:
        raise ArgumentError(f"{folder} is no run, so it has no steps and no averaged weights")
    elif (folder / "config.json").is_file():
        found = _load_folder(folder)
    else:
        raise ArgumentError(
            f"{folder} holds neither a run (plan.json) nor a model of transformers (config.json)"
            if folder.is_dir()
            else f"there is no folder {folder}"
        )
    if found.is_transformers:  # sampling is decided by the caller, not by the folder
        found.model.generation_config = GenerationConfig()
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = _DTYPES[dtype or _native(found.model, device=where)]
    for adapter in map(Path, adapters):
        found.require_transformers("merging adapters")
        digest = merge_adapters(found.model.float(), load_adapters(adapter), digest=found.digest)
        found = replace(found, digest=digest, name=f"{found.name}+{adapter.resolve().name}")
    found.model.to(device=where, dtype=chosen).requires_grad_(False).eval()
    return found


def _native(model: Any, *, device: str) -> Dtype:
    """The type in which a device computes with stored weights: bf16 only where it does not emulate it."""
    able = torch.cpu.get_capabilities()
    is_fast = device != "cpu" or able.get("avx512_bf16") or able.get("amx_bf16")
    return "bf16" if is_fast and next(model.parameters()).dtype == torch.bfloat16 else "fp32"


def end_ids(*named: Any) -> tuple[int, ...]:
    """Collect token ids that end a text, of configs that give one, a list of them, or none."""
    every = [one for value in named for one in (value if isinstance(value, (list, tuple)) else [value])]
    ids = [one for one in every if isinstance(one, int) and not isinstance(one, bool) and one >= 0]
    return tuple(dict.fromkeys(ids))


def _load_run(folder: Path, *, step: int | str | None, ema: bool) -> LoadedModel:
    plan = read_plan(folder)
    if plan.code is not None:
        require_trusted(plan.code.digest, run_folder=folder)
        restore_code(plan.code.digest, run_folder=folder)
        use_code(plan.code.digest)
    job = plan.job
    checkpoint = open_verified(open_storage(job.checkpoint.url_of(str(folder))), step=step)
    return loaded_of_plan(
        plan,
        load_model(plan, checkpoint, ema=ema),
        tokenizer=folder / "tokenizer",
        name=folder.resolve().name,
        step=checkpoint.progress.step,
        digest=digest_of(checkpoint, ema=ema),
    )


def loaded_of_plan(plan: Plan, model: Any, *, tokenizer: Path, name: str, step: int, digest: str) -> LoadedModel:
    """A model of a run as `load` returns it.

    Args:
        model: with its weights, in evaluation mode.
        tokenizer: the folder with the tokenizer's files.
    """
    job = plan.job
    text_tokenizer = replace(load_tokenizer(str(tokenizer)), special_tokens=job.data.special_tokens)
    template = find_chat_template(text_tokenizer, own=_own_template(plan))
    is_reward = job.training.objective == "reward"
    is_own = not isinstance(model, PreTrainedModel)  # a user model may support only the length it was trained on
    limit = job.data.seq_len if is_own else plan.model.max_seq_len
    ends = end_ids(plan.corpus.eot_id, None if is_own else model.config.eos_token_id)
    named = plan.model.generation.get("eos_token_id")
    return LoadedModel(
        model=model,
        tokenizer=parse_tokenizer(text_tokenizer),
        text_tokenizer=text_tokenizer,
        name=name,
        kind="reward" if is_reward else KINDS[job.training.auto_class],
        step=step,
        digest=digest,
        max_positions=limit,
        end_ids=ends if is_own else end_ids(list(ends), named),
        chat_template=template,
        chat_encoder=ChatEncoder(text_tokenizer, seq_len=_ANY_LENGTH, template=template),
        frame=text_frame(text_tokenizer) if job.training.auto_class == "AutoModelForSeq2SeqLM" else None,
        labels=() if is_reward or is_own else _labels(model.config),
        problem_type=None if is_own else model.config.problem_type,
        start_ids=() if is_own else _start_ids(model.config, plan.model.generation),
        before=_before(parse_tokenizer(text_tokenizer)),
        max_source=min(job.data.seq_len, limit or job.data.seq_len),
        prefix=job.data.pair.prefix,
        pooling=job.training.contrastive.pooling,
        is_normalised=job.training.contrastive.similarity == "cosine",
    )


def _load_folder(folder: Path) -> LoadedModel:
    config = load_config(str(folder))
    name = auto_class_of_config(config)
    model = _read_folder(folder, auto_class=name)
    tokenizer = load_tokenizer(str(folder))
    template = find_chat_template(tokenizer, own=None)
    generation = read_generation(str(folder))
    limit = num_positions(model)
    pooling = _pooling(folder)
    return LoadedModel(
        model=model,
        tokenizer=parse_tokenizer(tokenizer),
        text_tokenizer=tokenizer,
        name=folder.resolve().name,
        kind=KINDS[name],
        step=None,
        digest=digest_of_folder(folder),
        max_positions=limit,
        end_ids=end_ids(tokenizer.eot_id, config.eos_token_id, generation.get("eos_token_id")),
        chat_template=template,
        chat_encoder=ChatEncoder(tokenizer, seq_len=_ANY_LENGTH, template=template),
        frame=text_frame(tokenizer) if name == "AutoModelForSeq2SeqLM" else None,
        labels=_labels(config) if AUTO_CLASSES[name].has_labels else (),
        problem_type=getattr(config, "problem_type", None),
        start_ids=_start_ids(config, generation),
        before=_before(parse_tokenizer(tokenizer)),
        max_source=limit,
        pooling=pooling,
    )


def _read_folder(folder: Path, *, auto_class: AutoClass) -> Any:
    """Load the model with every weight. Raises: ArgumentError if transformers cannot, or weights are missing."""
    loader: Any = getattr(transformers, auto_class)
    shown = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, about = loader.from_pretrained(
            str(folder),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except ForgeError:
        raise
    except Exception as error:  # transformers raises exceptions of several unrelated classes
        raise ArgumentError(f"the model of {folder} cannot be loaded: {one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(shown)
        transformers_logging.enable_progress_bar()
    missing = [name for name in sorted(about["missing_keys"]) if not name.startswith("pooler.")]
    if missing:
        raise ArgumentError(
            f"{folder} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        )
    return model


def _start_ids(config: Any, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The start token of a decoder, and the token of the target language where the model has one."""
    if not config.is_encoder_decoder:
        return ()
    return end_ids(
        generation.get("decoder_start_token_id", getattr(config, "decoder_start_token_id", None)),
        generation.get("forced_bos_token_id"),
    )


def _labels(config: Any) -> tuple[str, ...]:
    if getattr(config, "problem_type", None) == "regression" or config.num_labels == 1:
        return ()
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def _before(tokenizer: Tokenizer) -> tuple[int, ...]:
    plain, whole = (tokenizer.encode(_PROBE, add_special_tokens=added).ids for added in (False, True))
    at = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:at])


def _own_template(plan: Plan) -> str | None:
    """The content of `data.chat.template`. Raises: CheckpointError if the job names a file that is not there."""
    path = plan.job.data.chat.template
    if path is None:
        return None
    try:
        return read_file(Path(path), max_bytes=_MAX_TEMPLATE_BYTES).decode()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"data.chat.template of the run cannot be read: {one_line(error)}") from error


def _pooling(folder: Path) -> Literal["mean", "cls", "last_token"]:
    """How a folder of sentence-transformers makes embeddings; their mean if it does not say.

    Raises: ArgumentError for a way that forge does not know.
    """
    path = folder / "1_Pooling" / "config.json"
    try:
        body = parse_object(read_file(path, max_bytes=_MAX_POOLING_BYTES))
    except FileNotFoundError:
        return "mean"
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read: {one_line(error)}") from error
    modes = [key for key, value in body.items() if key.startswith("pooling_mode_") and value is True]
    known: dict[str, Literal["mean", "cls", "last_token"]] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last_token",
    }
    if len(modes) != 1 or modes[0] not in known:
        raise ArgumentError(f"{path}: forge embeds texts by one of {', '.join(known)}, not by {modes or 'none'}")
    return known[modes[0]]
