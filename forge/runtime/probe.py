"""Probes for the planner: the model's parameters and FLOPs, the hardware of one worker, the slots of a cluster.

The model is inspected in a subprocess, because that needs torch, which the client never imports. The answer is
cached, since it depends on the request and the versions of transformers and forge alone.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from forge.cluster.base import ClusterStatus
from forge.cluster.local.provider import LocalCluster
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.locations import combined
from forge.config.model import ModelSpec
from forge.data.vocabulary import Vocabulary
from forge.errors import ClusterError, JobFileError, PlanError
from forge.foreign import from_record
from forge.fs import default_cache_dir, write_atomic
from forge.limits import cpu_name, usable_cpus, usable_memory_bytes
from forge.plan.flops import forward_flops_per_token
from forge.plan.gpu_kinds import WorkerGpu, planned_gpu
from forge.plan.gpus import find_gpu
from forge.plan.inputs import CodeInfo, CorpusInfo, HardwareInfo, ModelInfo, TeacherInfo
from forge.plan.outputs import outputs_of
from forge.process import ending
from forge.runtime.local_gpus import local_gpus, num_local_gpus

_ANSWER = 7
"""Must change whenever `forge.model.inspect` answers an equal request otherwise, since answers are kept."""


_LEAST_SHARE = 0.9
"""Of the memory that a GPU's name states: its driver reserves some, and reports less."""


def inspect_model(
    loaded: LoadedJob, *, vocabulary: Vocabulary, code: CodeInfo | None, corpus: CorpusInfo | None = None
) -> ModelInfo:
    """Parameters and FLOPs of the job's model.

    Args:
        corpus: with the labels of a classifier; None if it is not prepared.

    Raises: JobFileError for a key or value of `model:` that transformers does not know; PlanError if the inspection
        itself failed.
    """
    job = loaded.job
    request = {
        "model": job.model.model_dump(mode="json"),
        "vocab_size": vocabulary.size,
        "seq_len": job.data.seq_len,
        "eot_id": vocabulary.eot_id,
        **asdict(outputs_of(job, corpus=corpus)),
        "pad_id": vocabulary.pad_id,
        "code": code.digest if code is not None and "model.class" in job.user_classes else None,
    }
    answer = _cached_answer(request, is_cacheable=job.model.from_pretrained is None)
    if "complaint" in answer:
        raise _job_file_error(loaded, **answer["complaint"])
    return from_record(ModelInfo, answer["facts"])


def inspect_teacher(loaded: LoadedJob, *, vocabulary: Vocabulary) -> TeacherInfo | None:
    """Count the teacher of a distillation; None if the job has none.

    Raises: JobFileError if it is no causal language model, or its weights cannot be used.
    """
    job, spec = loaded.job, loaded.job.training.distillation
    if spec.teacher is None:
        return None
    request = {
        "model": ModelSpec(from_pretrained=spec.teacher).model_dump(mode="json"),
        "vocab_size": vocabulary.size,
        "seq_len": job.data.seq_len,
        "eot_id": vocabulary.eot_id,
        "code": None,
    }
    answer = _inspect(request)
    key = "training.distillation.teacher"
    if "complaint" in answer:
        raise loaded.source.error(key, answer["complaint"]["problem"])
    found = from_record(ModelInfo, answer["facts"])
    problem = found.look_ahead_problem
    if job.data.packing == "examples" and found.isolation_problem is not None:
        problem = f"{found.isolation_problem}, so the examples of a sequence would see each other"
    if found.max_seq_len is not None and found.max_seq_len < job.data.seq_len:
        problem = f"it has positions for {found.max_seq_len} tokens, but data.seq_len is {job.data.seq_len}"
    if found.vocab_size < vocabulary.size:
        problem = f"it has logits of {found.vocab_size} tokens, but the tokenizer has {vocabulary.size}"
    if problem is not None:
        raise loaded.source.error(key, problem)
    return TeacherInfo(
        source=spec.teacher,
        digest=spec.digest or "",
        class_name=found.class_name,
        num_parameters=found.num_parameters,
        forward_flops_per_token=forward_flops_per_token(found, seq_len=job.data.seq_len),
        vocab_size=found.vocab_size,
    )


def require_packages(loaded: LoadedJob) -> None:
    """Raises: JobFileError if the job needs peft or bitsandbytes and it is not installed."""
    lora, optimizer = loaded.job.model.lora, loaded.job.training.optimizer.name
    if lora is not None and find_spec("peft") is None:
        problem = "needs the package peft, which is not installed: pip install peft==0.21.2"
        raise loaded.source.error("model.lora", problem, show_value=False)
    if optimizer == "adamw-8bit" and find_spec("bitsandbytes") is None:
        raise loaded.source.error(
            "training.optimizer.name",
            "needs the package bitsandbytes, which is not installed: pip install bitsandbytes, here and on every "
            "machine; or use lion, whose state is half of adamw's",
        )


def hardware(job: JobSpec, *, gpu_there: WorkerGpu | None = None, is_here: bool = True) -> HardwareInfo:
    """The hardware that one worker of the job gets on this machine or on a remote cluster.

    Args:
        gpu_there: of the remote cluster's workers; None if it has none.
        is_here: whether the job runs on this machine.

    Raises: PlanError if the job names a GPU that is not in the catalog.
    """
    wanted = job.resources.gpu
    if wanted not in ("auto", "none"):
        gpu = find_gpu(wanted)
        if gpu is None:
            raise PlanError(
                f"resources.gpu: no GPU named {wanted!r} is known; use auto, none, or a name like A100-80GB"
            )
        named = WorkerGpu(name=gpu.name, memory_bytes=gpu.memory_gib * 2**30)
        if not is_here and gpu_there is not None and gpu_there.memory_bytes < _LEAST_SHARE * named.memory_bytes:
            note = f"the plan is for {gpu.name} (resources.gpu), but nodes have {gpu_there.name} with less memory"
            named = replace(named, note=f"{note}: set resources.gpu: auto")
        return _gpu_hardware(named, precision=job.training.precision)
    found = (_gpu_here() if is_here else gpu_there) if wanted == "auto" else None
    if found is not None:
        return _gpu_hardware(found, precision=job.training.precision)
    if not is_here:
        return HardwareInfo(device="cpu", name="of the cluster", memory_bytes=None, peak_flops=None)
    share = usable_memory_bytes() // job.resources.workers.high
    return HardwareInfo(device="cpu", name=cpu_name(), memory_bytes=share, peak_flops=None)


def _gpu_here() -> WorkerGpu | None:
    """The GPU to plan for on this machine, of those that CUDA may use."""
    found = local_gpus()
    stated = [WorkerGpu(name=name, memory_bytes=memory_bytes) for name, memory_bytes in found]
    return planned_gpu(Counter(name for name, _ in found), stated=stated)


def _gpu_hardware(found: WorkerGpu, *, precision: str) -> HardwareInfo:
    """A GPU with its peak FLOP/s from the catalog; None for a GPU that is not in it."""
    gpu = find_gpu(found.name)
    peak_flops = None if gpu is None else gpu.bf16_flops if precision == "bf16" else gpu.fp32_flops
    return HardwareInfo(
        device="cuda", name=found.name, memory_bytes=found.memory_bytes, peak_flops=peak_flops, note=found.note
    )


def count_local_slots(found: HardwareInfo, job: JobSpec) -> int:
    """How many workers fit on the cluster that is up on this machine, otherwise on the machine itself."""
    # The minimum of workers always has slots, if need be several ranks per core.
    num_slots = num_local_gpus() if found.device == "cuda" else max(usable_cpus(), job.resources.workers.low)
    with contextlib.suppress(ClusterError):  # the cluster of `forge chaos` has no status
        status = LocalCluster().status()
        if status.address is not None:
            return count_slots(status, found)
    return num_slots


def count_slots(status: ClusterStatus, found: HardwareInfo) -> int:
    """How many workers fit on the live nodes of a cluster."""
    alive = [node for node in status.nodes if node.state == "alive"]
    return int(sum(node.num_gpus if found.device == "cuda" else node.num_cpus for node in alive))


def _job_file_error(
    loaded: LoadedJob,
    *,
    problem: str,
    key: str | None,
    more_keys: Sequence[str] = (),
    suspects: Sequence[str] = (),
    choices: Sequence[str] = (),
) -> JobFileError:
    """The error of a ModelError's fields. Of several suspects, a key from `--set` was changed last."""
    locations = loaded.source.locations
    own = [name for name in suspects if (at := locations.get(f"model.{name}")) is not None and at.line is None]
    key = own[0] if own else key
    if key is None:
        return loaded.source.error("model", problem)
    return combined([_key_error(loaded, problem, key=name, choices=choices) for name in (key, *more_keys)])


def _key_error(loaded: LoadedJob, problem: str, *, key: str, choices: Sequence[str]) -> JobFileError:
    is_field = key in ModelSpec.model_fields
    wrong = str(getattr(loaded.job.model, key)) if is_field else key
    nearest = difflib.get_close_matches(wrong, choices, n=1)
    is_unknown = bool(choices) and not is_field
    return loaded.source.error(
        f"model.{key}", problem, nearest=nearest[0] if nearest else None, show_value=not is_unknown
    )


def _cached_answer(request: dict[str, Any], *, is_cacheable: bool) -> dict[str, Any]:
    text = json.dumps(
        request | {"answer": _ANSWER, "transformers": version("transformers"), "forge": version("forge-train")}
    )
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    path = default_cache_dir() / "models" / f"{name}.json"
    if is_cacheable:
        try:
            answer: dict[str, Any] = json.loads(path.read_text())
            if from_record(ModelInfo, answer["facts"]).trained:
                return answer
        except (OSError, ValueError, KeyError, TypeError):
            pass
    answer = _inspect(request)
    if is_cacheable and "facts" in answer:
        with contextlib.suppress(OSError):  # without a cache the next inspection only takes longer
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(answer))
    return answer


def _inspect(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "forge.model.inspect"]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env=quiet, check=False
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [ending(done.returncode)]
        raise PlanError(f"cannot inspect the model: {lines[-1]}") from None
    return answer
