"""Start vLLM for a model: give it a folder of weights in its form, and only as much memory as there is."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forge.errors import ArgumentError, ClusterError
from forge.inference.adapters import AdapterWeights, ServedAdapters
from forge.inference.loaded import LoadedModel
from forge.limits import free_memory_bytes
from forge.runs.reader import read_plan
from forge.serve.export import ExportRequest, export
from forge.serve.http.settings import ServerSettings
from forge.serve.request import EngineOptions
from forge.serve.vllm.engine import VllmEngine
from forge.serve.vllm.process import VllmInstall, VllmOptions, VllmProcess
from forge.units import format_bytes

_log = logging.getLogger("forge.serve")
_PROCESS_BYTES = 2 * 2**30
"""Of vLLM's two processes with torch, beside weights and cache; measured on a CPU: 1.6 GiB."""
_DTYPES = {torch.float32: ("float32", "fp32"), torch.bfloat16: ("bfloat16", "bf16")}
"""Names of vLLM and of forge's export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPlace:
    """Where vLLM is installed on this machine, and where it may write."""

    install: VllmInstall
    log: Path
    exports: Path
    """A folder for the weights of runs, while vLLM loads them."""


def require_servable(loaded: LoadedModel) -> None:
    """Raises: ArgumentError if forge does not serve this model with vLLM."""
    if loaded.kind != "causal-lm" or not loaded.is_transformers:
        what = "a model of your own class" if loaded.kind == "causal-lm" else f"a {loaded.kind} model"
        raise ArgumentError(
            f"--engine vllm serves causal language models of transformers, and {loaded.name} is {what}; serve it "
            "with --engine forge"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmStart:
    """What vLLM has to be told of a model; made before the model's weights are freed for it."""

    source: Path
    """A run, or a folder of transformers."""
    ema: bool
    adapters: Mapping[str, Path]
    max_rank: int
    """Of the adapters."""
    dtype: torch.dtype
    weight_bytes: int
    token_bytes: int
    """Keys and values of one token."""
    options: EngineOptions

    @classmethod
    def prepare(
        cls,
        loaded: LoadedModel,
        settings: ServerSettings,
        *,
        weights: Mapping[str, AdapterWeights],
        options: EngineOptions,
    ) -> VllmStart:
        """Measure the model. Raises: ArgumentError if the adapters do not belong to it."""
        ServedAdapters(loaded.model, weights, digest=loaded.digest)
        config: Any = loaded.model.config.get_text_config()
        parameters = list(loaded.model.parameters())
        dtype, heads = parameters[0].dtype, config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        ranks = (update.down.shape[0] for each in weights.values() for update in each.layers.values())
        return cls(
            source=Path(settings.source),
            ema=settings.ema,
            adapters={name: Path(source) for name, source in settings.named_adapters().items()},
            max_rank=max(ranks, default=0),
            dtype=dtype,
            weight_bytes=sum(each.numel() * each.element_size() for each in parameters),
            token_bytes=2 * config.num_hidden_layers * kept * size * dtype.itemsize,
            options=options,
        )

    def run(self, loaded: LoadedModel, place: VllmPlace) -> VllmEngine:
        """Start vLLM, and wait until it is ready.

        Args:
            loaded: without its weights.

        Raises: ClusterError with the reason if vLLM cannot serve the model.
        """
        gc.collect()
        options = self.options
        cache_bytes = None
        if place.install.is_cuda:
            torch.cuda.empty_cache()
        else:
            cache_bytes = options.cache_tokens * self.token_bytes
            self._require_memory(cache_bytes=cache_bytes)
        max_length = min(loaded.max_positions or options.cache_tokens, options.cache_tokens)
        place.exports.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.exports) as name:
            names, folder = _DTYPES[self.dtype], Path(name)
            model = _folder_of(self.source, to=folder / "model", step=loaded.step, ema=self.ema, dtype=names[1])
            adapters = {
                each: _folder_of(path, to=folder / f"adapter-{number}", dtype="fp32", adapters=True)
                for number, (each, path) in enumerate(self.adapters.items())
            }
            _log.info("starting vLLM %s; its log is %s", place.install.version, place.log)
            process = VllmProcess(
                VllmOptions(
                    install=place.install,
                    model=model,
                    dtype=names[0],
                    max_length=max_length,
                    max_rows=options.max_rows,
                    cache_bytes=cache_bytes,
                    log=place.log,
                    adapters=adapters,
                    max_rank=self.max_rank,
                )
            )
        return VllmEngine(
            loaded,
            process=process,
            max_length=max_length,
            cache_tokens=options.cache_tokens,
            adapters=tuple(self.adapters),
        )

    def _require_memory(self, *, cache_bytes: int) -> None:
        needed, free = self.weight_bytes + cache_bytes + _PROCESS_BYTES, free_memory_bytes()
        if needed > free:
            raise ClusterError(
                f"vLLM needs about {format_bytes(needed)} of memory ({format_bytes(self.weight_bytes)} of weights, "
                f"{format_bytes(cache_bytes)} of keys and values, {format_bytes(_PROCESS_BYTES)} of its own), and "
                f"{format_bytes(free)} are free on this machine; end something, or serve with --engine forge"
            )


def _folder_of(
    source: Path, *, to: Path, dtype: str, step: int | None = None, ema: bool = False, adapters: bool = False
) -> Path:
    """The folder that vLLM loads: the given one, or of a run an export of its checkpoint."""
    if not (source / "plan.json").is_file():
        return source
    url = read_plan(source).job.checkpoint.url_of(str(source))
    tokenizer = None if adapters else str(source / "tokenizer")
    export(
        ExportRequest(url=url, to=str(to), step=step, dtype=dtype, ema=ema, tokenizer=tokenizer, adapters=adapters)
    )
    return to
