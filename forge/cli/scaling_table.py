"""What scaling laws say, as tables and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from forge.cli import display
from forge.plan.machines import ASSUMED_INTER_NODE_GBPS, interconnect
from forge.plan.scaling import BESIROGLU, FITTED_SIZES, OTHER_LAWS, WORTHWHILE_PASSES, ModelScale, ScalingLaw
from forge.plan.sizing import PATIENCE_HOURS, SizedRun
from forge.plan.throughput import Estimate
from forge.runs.scaling_runs import LawFile
from forge.units import format_count, format_duration


def show_sizing(run: SizedRun, *, notes: Sequence[str]) -> None:
    """Print the model that was chosen, what it takes, and what each law says about the same FLOPs."""
    scale, law, shape = run.scale, run.goal.law, run.shape
    display.headline(
        f"{format_count(scale.num_parameters)} parameters, {format_count(scale.num_tokens)} tokens",
        f"the best model for {run.goal.limit}",
        console=display.OUT,
    )
    rate = run.tokens_per_s
    heads = f"{shape.num_attention_heads} heads ({shape.num_key_value_heads} of keys and values)"
    facts = [
        ("model", f"llama, {shape.num_hidden_layers} layers of {shape.hidden_size:,}, {heads}"),
        (
            "training",
            f"{scale.training_flops:.3g} FLOPs, {scale.num_tokens / scale.num_parameters:.1f} tokens per parameter",
        ),
        ("batch", f"{run.batch.global_batch_size:,} x {run.goal.seq_len:,} tokens, lr {run.learning_rate:g}"),
        ("machines", run.machines.name),
        ("engine", _engine(run)),
        ("speed", f"{_range(rate, ',.0f')} tokens/s"),
        ("time", _times(run.hours)),
        ("USD", "unknown price" if run.usd is None else _range(run.usd, ",.2f")),
        ("loss", f"{_loss(law, scale)} nats per token, by {law.name}"),
    ]
    if run.goal.inference_tokens:
        best = law.best_scale(scale.training_flops)
        saved = 1 - scale.num_parameters / best.num_parameters
        text = (
            f"{format_count(run.goal.inference_tokens)} tokens at {saved:.0%} fewer FLOPs each than the model of "
        )
        facts.append(("inference", f"{text}least loss, whose loss is {law.loss(best):.3f}"))
    display.facts(facts)
    display.table(
        ["law", "#parameters", "#tokens", "#loss"],
        [
            [name, format_count(best.num_parameters), format_count(best.num_tokens), _text(loss)]
            for name, best, loss in _by_laws(run)
        ],
    )
    for note in notes:
        display.message(note)


def sizing_notes(run: SizedRun) -> list[str]:
    """Say what was assumed."""
    notes = [
        "hours and USD are of training steps alone; `forge plan` of the job file adds the rest",
        "losses of published laws are those of their corpora: on other text the value differs, the ratio of tokens "
        "to parameters is similar",
    ]
    smallest, largest = FITTED_SIZES
    if run.goal.law is BESIROGLU and not smallest <= run.shape.num_parameters <= largest:
        notes.append(
            f"the law was fitted to models of {format_count(smallest)} to {format_count(largest)} parameters; this "
            "is an extrapolation"
        )
    notes.append(
        f"the corpus needs {format_count(run.num_tokens / WORTHWHILE_PASSES)} tokens or more: read more than "
        f"{WORTHWHILE_PASSES} times, tokens are worth less than new ones"
    )
    links = run.machines.interconnect
    if run.machines.num_gpus > links.gpus_per_node and links == interconnect(
        gpus_per_node=links.gpus_per_node, gbps=None
    ):
        notes.append(f"assumed: {ASSUMED_INTER_NODE_GBPS:.0f} Gbit/s between machines")
    if run.hours.likely > PATIENCE_HOURS:
        notes.append(f"takes {format_duration(3600 * run.hours.likely)}; --gpus COUNT asks for more GPUs")
    if run.taken(run.goal.limit.kind) < 0.9 * run.goal.limit.amount:
        notes.append(f"larger models do not fit on these GPUs, so {run.goal.limit} are not used up; give more GPUs")
    best = run.goal.law.best_scale(run.scale.training_flops, inference_tokens=run.goal.inference_tokens)
    if best.num_parameters < 0.8 * run.shape.num_parameters:
        notes.append("the best model would be smaller than the smallest with this vocabulary")
    return notes


def sizing_record(run: SizedRun, *, notes: Sequence[str]) -> dict[str, Any]:
    """Return everything that `show_sizing` prints, for `-o json`."""
    return {
        "limit": asdict(run.goal.limit),
        "law": run.goal.law.name,
        "num_parameters": run.shape.num_parameters,
        "num_tokens": run.num_tokens,
        "flops": run.scale.training_flops,
        "inference_tokens": run.goal.inference_tokens,
        "model": asdict(run.shape),
        "seq_len": run.goal.seq_len,
        "global_batch_size": run.batch.global_batch_size,
        "micro_batch_size": run.batch.micro_batch_size,
        "learning_rate": run.learning_rate,
        "zero_stage": run.training.zero.stage,
        "hpz_partition_size": run.groups.hpz_partition_size,
        "num_shard_groups": run.groups.num_shard_groups,
        "activation_checkpointing": run.training.activation_checkpointing,
        "machines": run.machines.name,
        "gpu": run.machines.gpu.name,
        "num_gpus": run.machines.num_gpus,
        "usd_per_hour": run.machines.usd_per_hour,
        "tokens_per_s": asdict(run.tokens_per_s),
        "hours": asdict(run.hours),
        "usd": None if run.usd is None else asdict(run.usd),
        "loss": prediction(run.goal.law, run.scale)["loss"],
        "laws": [
            {"law": name, "num_parameters": best.num_parameters, "num_tokens": best.num_tokens, "loss": loss}
            for name, best, loss in _by_laws(run)
        ],
        "notes": list(notes),
    }


def show_law(found: LawFile, *, scales: Mapping[str, ModelScale]) -> None:
    """Print a fitted law, how it fits its runs, and predictions."""
    law = found.law
    display.headline(
        "L",
        f"= {law.irreducible_loss:.3f} + {law.parameter_factor:.4g}/N^{law.parameter_exponent:.3f} "
        f"+ {law.token_factor:.4g}/D^{law.token_exponent:.3f}",
        console=display.OUT,
    )
    rows = [
        [
            run.name,
            format_count(run.num_parameters),
            format_count(run.num_tokens),
            f"{run.loss:.3f}",
            f"{law.loss(run.scale):.3f}",
        ]
        for run in sorted(found.runs, key=lambda run: run.scale.training_flops)
    ]
    rows += [
        [name, format_count(scale.num_parameters), format_count(scale.num_tokens), "", _loss(law, scale)]
        for name, scale in scales.items()
    ]
    display.table(["run", "#parameters", "#tokens", "#measured", "#law"], rows)


def prediction(law: ScalingLaw, scale: ModelScale) -> dict[str, Any]:
    """Return a scale and its expected loss, for `-o json`."""
    expected = law.loss_range(scale)
    loss = {"low": None, "likely": law.loss(scale), "high": None} if expected is None else asdict(expected)
    return asdict(scale) | {"flops": scale.training_flops, "loss": loss}


def _by_laws(run: SizedRun) -> list[tuple[str, ModelScale, float | None]]:
    """The best scale by the law that was used, and by the others, for the same FLOPs."""
    flops = run.scale.training_flops
    found: list[tuple[str, ModelScale, float | None]] = []
    for law in (run.goal.law, *OTHER_LAWS):
        best = law.best_scale(flops)
        found.append((law.name, best, law.loss(best) if isinstance(law, ScalingLaw) else law.loss(flops)))
    return found


def _engine(run: SizedRun) -> str:
    batch = run.batch
    chosen = run.training.activation_checkpointing
    recomputed = f", activations recomputed{' selectively' if chosen == 'selective' else ''}" if chosen else ""
    accumulated = f"micro-batch {batch.micro_batch_size} x {batch.gradient_accumulation_steps}"
    groups = f", hpZ groups of {run.groups.hpz_partition_size}" if run.groups.hpz_partition_size > 1 else ""
    if run.groups.num_shard_groups > 1:
        groups = f" in {run.groups.num_shard_groups} shard groups"
    return f"ZeRO {run.training.zero.stage}{groups}, {accumulated}{recomputed}"


def _loss(law: ScalingLaw, scale: ModelScale) -> str:
    expected = law.loss_range(scale)
    return f"{law.loss(scale):.3f}" if expected is None else _range(expected, ".3f")


def _range(value: Estimate, form: str) -> str:
    return f"{value.likely:{form}} ({value.low:{form}} to {value.high:{form}})"


def _times(hours: Estimate) -> str:
    low, likely, high = (format_duration(3600 * value) for value in (hours.low, hours.likely, hours.high))
    return f"{likely} ({low} to {high})"


def _text(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"
