"""A plan and a run in words: lines of a name and a text, for a screen or a page.

The text is plain; how it looks is decided by whoever shows it.
"""

from __future__ import annotations

import math

from forge.plan.plan import Plan
from forge.report.runs import RunSummary
from forge.units import format_bytes, format_count, format_duration


def headline(plan: Plan) -> str:
    """A job's size in a few words."""
    return (
        f"{format_count(plan.model.num_parameters)} parameters, "
        f"{format_count(plan.total_tokens)} tokens, {plan.total_steps:,} steps"
    )


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """What will be trained, on what, how."""
    training, corpus = plan.job.training, plan.corpus
    total_flops = plan.flops_per_token * plan.total_tokens
    facts = [
        ("model", f"{plan.model.class_name}, {plan.model.num_layers} layers of {plan.model.hidden_size}"),
        (
            "batch",
            f"{training.global_batch_size} sequences of {plan.job.data.seq_len} tokens, "
            f"the same at every number of workers",
        ),
        ("training", f"{training.precision}, ZeRO {training.zero.stage}, lr {training.optimizer.lr:g} "
         f"({training.schedule.kind}, {training.schedule.warmup_steps} steps of warm-up)"),
        ("arithmetic", f"{format_count(plan.flops_per_token)}FLOP per token, "
         f"{format_count(total_flops)}FLOP in all"),
        ("hardware", _hardware(plan)),
    ]  # fmt: skip
    if corpus:
        epochs = plan.total_steps * training.global_batch_size / max(1, corpus.num_train_sequences)
        facts.insert(1, (
            "corpus",
            f"{corpus.num_documents:,} documents, {format_count(corpus.num_train_tokens)} training tokens "
            f"({epochs:.2f} epochs), {format_count(corpus.num_held_out_tokens)} held out, "
            f"vocabulary {corpus.vocab_size:,}",
        ))  # fmt: skip
    return facts


def summary_facts(run: RunSummary) -> list[tuple[str, str]]:
    """What a run reached, and where it lies; why it ended early is told by `forge.report.runs.failure_of`."""
    unigram = run.plan.corpus.unigram_perplexity if run.plan.corpus else math.nan
    facts: list[tuple[str, str]] = []
    if run.last:
        facts.append(("loss", f"{number(run.last['train/loss'], '.4f')} on the last batch"))
    for weights, name in (("current", "held out"), ("ema", "held out, ema")):
        evaluated = run.newest("Evaluated", weights=weights)
        if evaluated:
            text = f"perplexity {number(evaluated['perplexity'], '.2f')}"
            if weights == "current" and math.isfinite(unigram):
                text += f" (a unigram model of the same tokens has {unigram:.1f})"
            facts.append((name, text))
    if run.last:
        facts.append(
            ("speed", f"{number(run.last['speed/tokens_per_s'], ',.0f')} tokens/s, "
             f"MFU {number(run.last['speed/mfu'], '.3f')}, {format_duration(run.updated - run.started)} in all")
        )  # fmt: skip
    saved = run.newest("CheckpointSaved")
    if saved:
        facts.append(("checkpoint", f"{saved['folder']}"))
    facts.append(("files", f"{run.folder} (metrics.jsonl, events.jsonl, logs, wandb)"))
    return facts


def number(value: float | None, shape: str) -> str:
    """A value in a given format; `-` where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, shape)


def _hardware(plan: Plan) -> str:
    hardware = plan.hardware
    memory = f", {format_bytes(hardware.memory_bytes)} a worker" if hardware.memory_bytes else ""
    return f"{'GPU' if hardware.device == 'cuda' else 'CPU'} {hardware.name}{memory}"
