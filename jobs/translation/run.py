"""Train three encoder-decoders to translate, and print the table of their BLEU-4 and ROUGE-L scores.

    make fixtures
    python jobs/translation/run.py

A model whose run has finished is not trained again; delete runs/translation-* to train all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from forge import api
from forge.evaluate.table import to_markdown
from forge.runs.reader import read_run

HERE = Path(__file__).parent
MODELS = ("bert-to-bert", "t5", "transformer-2017")
PAIRS = Path(".fixtures/debian/en-de.jsonl")
SYNOPSES = Path(".fixtures/debian/synopses-en-de.jsonl")


def main() -> None:
    """Train what is not trained yet, evaluate all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of forge train")
    parser.add_argument("--limit", type=int, help="most examples that are translated")
    options = parser.parse_args()
    if not PAIRS.exists():
        sys.exit(f"there is no {PAIRS}; fetch it with: make fixtures")
    write_synopses()
    runs = [train(name, overrides=options.set) for name in MODELS]
    found = api.evaluate(runs, [HERE / "task.yaml"], limit=options.limit, on_message=report)
    sys.stdout.write(to_markdown(found.comparison))


def train(name: str, *, overrides: list[str]) -> Path:
    """Train a model, unless it is trained. Returns: the folder of its run."""
    job = api.load_job(HERE / f"{name}.yaml", overrides)
    for folder in sorted(Path(job.job.checkpoint.runs).glob(f"{job.job.name}-*"), reverse=True):
        if read_run(folder).status == "finished":
            return folder
    report(f"training {name}")
    return api.train_job(job).folder


def write_synopses() -> None:
    """Write the first lines of all descriptions, which are their summaries, as pairs; each once."""
    lines = {}
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        source, target = (record[key].partition("\n")[0].strip() for key in ("source", "target"))
        if source and target and source != target:
            lines[source] = json.dumps({"source": source, "target": target}, ensure_ascii=False)
    text = "".join(f"{line}\n" for line in lines.values())
    if not SYNOPSES.exists() or SYNOPSES.read_text(encoding="utf-8") != text:
        SYNOPSES.write_text(text, encoding="utf-8")


def report(text: str) -> None:
    """Print a message to stderr."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
