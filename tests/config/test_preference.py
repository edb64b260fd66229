"""Keys of objectives on preference pairs that do not fit together are named before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from forge.config.load import load_job
from forge.errors import JobFileError


def load(folder: Path, **changes: Any) -> Any:
    body: dict[str, Any] = {
        "name": "pairs",
        "model": {"from_pretrained": "base"},
        "data": {"files": "pairs.jsonl", "format": "preference"},
        "training": {"objective": "dpo", "total_steps": 3},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        body[section] |= {name: value} if name else value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(body))
    return load_job(path).job


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data__format": "chat"}, r"data\.format: must be preference for training\.objective: dpo"),
        ({"training__dpo": {"loss": "aot"}}, "dpo.loss"),
        ({"training__dpo": {"loss": "hinge", "label_smoothing": 0.1}}, "smoothing: has no meaning for the loss h"),
        ({"training__objective": "orpo", "training__dpo": {"beta": 0.2}}, "dpo: is only for objective: dpo or ipo"),
        ({"training__orpo": {"beta": 0.2}}, "orpo: is only for objective: orpo"),
        ({"training__objective": "orpo", "training__dpo": {"beta": 0.1}}, "dpo: is only for objective: dpo"),
        ({"training__masking": {}}, "masking: is only for objective: masked-lm, not dpo"),
        ({"data__pair": {}}, "pair: is only for format: pair, not preference"),
        ({"training__reward": {"center_coefficient": 0.1}}, "reward: is only for objective: reward"),
        ({"training__objective": "ipo", "training__dpo": {"loss": "sigmoid"}}, r"dpo\.loss: must be ipo"),
        ({"training__objective": "ipo", "training__dpo": {"label_smoothing": 0.1}}, "no meaning for the loss ipo"),
        ({"model": {"from_pretrained": None, "architecture": "llama"}}, r"must be model\.from_pretrained or"),
        (
            {"training__dpo": {"reference": "live"}, "model__lora": {"modules_to_save": "lm_head"}},
            "beside model.lora.modules_to_save",
        ),
        ({"model__lora": {"quantize": "nf4"}}, r"must be live with model\.lora\.quantize"),
        ({"data__text_key": "body"}, r"data\.text_key: is not read with format: preference"),
        ({"data__chat": {"turns": "last"}}, r"chat\.turns: is only for format: chat"),
        ({"data__format": "chat", "data__preference": {"texts": "plain"}}, "preference: is only for format: pref"),
    ],
)  # fmt: skip
def test_load_job__keys_that_do_not_fit__are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(JobFileError, match=problem):
        load(tmp_path, **changes)


def test_load_job__each_objective__has_its_own_loss(tmp_path: Path) -> None:
    losses = {
        "dpo": load(tmp_path).training.pair_loss,
        "ipo": load(tmp_path, training__objective="ipo").training.pair_loss,
        "hinge": load(tmp_path, training__dpo={"loss": "hinge"}).training.pair_loss,
    }
    assert losses == {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge"}
    scratch = {"from_pretrained": None, "architecture": "llama"}
    assert load(tmp_path, model=scratch, training__objective="orpo").data.packing == "examples"
