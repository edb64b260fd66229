"""Losses and gradients of preference objectives against those of trl's trainers on one padded batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forge.objective.pair_losses import PAIR_LOSSES, log_odds_ratio
from tests.objective.test_preference import gradients, llama, objective_of, with_reference
from tests.objective.test_reward import classifier
from tests.support.objectives import context_of
from tests.support.pairs import PAIRS, rows_of

pytestmark = pytest.mark.filterwarnings("ignore")


def records() -> list[dict[str, list[int]]]:
    """The pairs as trl's collator takes them."""
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in PAIRS
    ]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trl's DPOTrainer around `llama(0)` with the reference `llama(1)`."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    folder: Path = tmp_path_factory.mktemp("trl")
    context_of(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="[PAD]"
    )
    record = {"prompt": "a", "chosen": "b", "rejected": "c"}
    settings = DPOConfig(output_dir=str(folder / "out"), report_to=[], use_cpu=True, bf16=False, beta=0.3)
    return DPOTrainer(
        llama(0), ref_model=llama(1), args=settings, train_dataset=Dataset.from_list([record]),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_dpo__one_batch__has_the_loss_and_the_gradients_of_trl(trainer: Any, tmp_path: Path, name: str) -> None:
    smoothing = 0.2 if name == "robust" else 0.0
    trainer.loss_types, trainer.label_smoothing = [name], smoothing
    model = trainer.model.eval()
    expected = trainer.compute_loss(model, trainer.data_collator(records()))
    wanted = gradients(model, expected)
    objective = objective_of(tmp_path, "dpo", dpo={"loss": name, "beta": 0.3, "label_smoothing": smoothing})
    mine = llama(0)
    objective.use_chunks(mine)
    found = objective.loss(mine, objective.batch(with_reference(rows_of(*PAIRS), llama(1)))).sum / len(PAIRS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    live = objective_of(
        tmp_path, "dpo", reference=llama(1),
        dpo={"loss": name, "beta": 0.3, "label_smoothing": smoothing, "reference": "live"},
    )  # fmt: skip
    beside = live.loss(mine, live.batch(rows_of(*PAIRS))).sum / len(PAIRS)
    torch.testing.assert_close(beside, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in gradients(mine, beside).items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-3, atol=1e-5)
    for parameter, gradient in gradients(mine, found).items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-3, atol=1e-5)


def test_orpo__the_odds_ratio__is_that_of_trl() -> None:
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor([-0.2, -1.5, -4.0]), torch.tensor([-2.0, -1.4, -0.01])
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    losses = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    expected = 0.4 * torch.nn.functional.logsigmoid(log_odds_ratio(chosen, rejected))
    torch.testing.assert_close(expected, losses)


def test_reward__one_batch__has_the_loss_of_trl(tmp_path: Path) -> None:
    from collections import defaultdict

    from trl import RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    from forge.objective.build import build_objective

    examples = [
        {
            "chosen_ids": one["prompt_ids"] + one["chosen_ids"],
            "rejected_ids": one["prompt_ids"] + one["rejected_ids"],
        }
        for one in records()
    ]
    batch = DataCollatorForPreference(pad_token_id=99)(examples)
    gather = SimpleNamespace(gather=lambda values: values, gather_for_metrics=lambda values: values)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=gather, _total_train_tokens=0, _tp_size=1,
        _metrics={"eval": defaultdict(list)}, args=SimpleNamespace(center_rewards_coefficient=0.3),
    )  # fmt: skip
    expected = RewardTrainer.compute_loss(trainer, classifier(), batch)
    context = context_of(tmp_path, objective="reward", reward={"center_coefficient": 0.3})
    objective = build_objective("reward", context=context)
    found = objective.loss(classifier(), objective.batch(rows_of(*PAIRS)))
    torch.testing.assert_close(found.sum / 3, expected)
    metrics = trainer._metrics["eval"]
    assert float(found.metrics["accuracy"].sum) / 3 == pytest.approx(metrics["accuracy"][0])
    assert float(found.metrics["rewards_margin"].sum) / 3 == pytest.approx(metrics["margin"][0], rel=1e-4)
