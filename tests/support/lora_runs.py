"""Real runs of LoRA over one base model, trained in seconds without Ray, as folders that forge reads."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from forge.plan.inputs import CorpusInfo
from forge.plan.plan import plan_to_json
from tests.serve.test_export import LLAMA
from tests.serve.test_export_adapters import plan_of, save_base
from tests.support.jobs import VOCAB, synthetic_corpus
from tests.support.ranks import run_ranks


def write_words(folder: Path) -> None:
    """Write a tokenizer with a word for each id of the synthetic corpus."""
    ids = {"<eos>": 0} | {f"w{number}": number for number in range(1, VOCAB)}
    words = Tokenizer(WordLevel(ids, unk_token="<eos>"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<eos>"])
    folder.mkdir(parents=True, exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def train_lora_runs(root: Path, *, names: tuple[str, ...]) -> Path:
    """Train runs with different seeds over one base. Returns: the folder of the base, `root / "base"`."""
    corpus: CorpusInfo = synthetic_corpus(root / "corpus")
    save_base(root / "base", LLAMA)
    write_words(root / "base")
    for number, name in enumerate(names):
        plan = plan_of(root / "base", corpus, {}, training__seed=number + 1)
        run_ranks(plan, root / name / "checkpoints", world_size=1)
        (root / name / "plan.json").write_text(plan_to_json(plan, is_file=True))
        write_words(root / name / "tokenizer")
    return root / "base"
