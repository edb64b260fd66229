from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.config.data import DataSpec
from forge.data.held_out import held_out_of_run
from forge.data.loader import TrainBatches
from forge.data.look import look_at_corpus
from forge.data.mixture import find_corpus, mix, prepare_corpus
from forge.data.mixture_order import MixtureOrder, build_order, interleaved
from forge.data.mixture_view import view_data
from forge.data.prepare import open_rows, prepare
from forge.data.rows import MixedRows
from forge.data.transfer import fetch_corpus, read_chunk
from forge.data.view import ObjectiveView, Selection
from forge.errors import ArgumentError, DataError, PlanError
from forge.evaluate.contamination import training_texts
from forge.plan.batch import plan_batch
from forge.plan.inputs import CorpusInfo
from forge.plan.mixture import BLOCK, block_counts, epoch_sequences, part_shares

LM = ObjectiveView(predicts_tokens=True)


def write_documents(path: Path, *, word: str, count: int) -> Path:
    texts = [
        f"{word} {number} " + f"says {word} {number * number} things. " * (number % 7 + 1)
        for number in range(count)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "large": write_documents(folder / "large.jsonl", word="large", count=240),
        "small": write_documents(folder / "small.jsonl", word="little", count=40),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def spec_of(files: dict[str, Path], *, shares: dict[str, Any] | None = None, **settings: Any) -> DataSpec:
    given = shares or {"large": {"weight": 3}, "small": {"weight": 1}}
    parts = [{"name": name, "files": str(files[name]), **share} for name, share in given.items()]
    body = {"mixture": parts, "tokenizer": {"vocab_size": 300}, "seq_len": 16, "held_out": 0.1}
    return DataSpec.model_validate(body | settings)


@pytest.fixture(scope="module")
def facts(files: dict[str, Path], cache: Path) -> CorpusInfo:
    return prepare_corpus(spec_of(files), cache_dir=cache)


# ---- proportions


@pytest.mark.parametrize("counts", [(BLOCK // 2, BLOCK // 2), (65000, 500, 36), (5, 3, 1), (1,)])
def test_interleaved__has_every_part_as_often_as_asked(counts: tuple[int, ...]) -> None:
    assert np.bincount(interleaved(counts, seed=7)).tolist() == list(counts)


def test_interleaved__every_aligned_run__is_within_two_positions_of_the_proportion() -> None:
    counts = (40000, 20000, 5536)
    parts = interleaved(counts, seed=3)
    for length in (64, 512, 4096):
        found = np.stack([(parts.reshape(-1, length) == part).sum(axis=1) for part in range(3)])
        expected = np.array(counts)[:, None] * length / BLOCK
        assert np.abs(found - expected).max() < 2


def test_interleaved__neighbours__are_in_no_fixed_order() -> None:
    first = interleaved((BLOCK // 2, BLOCK // 2), seed=3)[::2]
    assert abs(first.mean() - 0.5) < 0.01
    assert (first != interleaved((BLOCK // 2, BLOCK // 2), seed=4)[::2]).any()


def test_mixture_order__of_three_blocks__reads_every_pass_of_a_part_whole_before_the_next() -> None:
    order = MixtureOrder(num_samples=(1000, 30), counts=(6, 2), seed=5)
    rows = order.samples(np.arange(8 * 60))
    small = rows[rows >= 1000] - 1000
    assert len(small) == 120
    for one in small.reshape(4, 30):
        assert sorted(one) == list(range(30))
    assert len(set(map(tuple, small.reshape(4, 30).tolist()))) == 4
    large = rows[rows < 1000]
    assert len(large) == len(set(large.tolist())) == 360


def test_mixture_order__positions_in_any_pieces__give_the_same_rows() -> None:
    order = MixtureOrder(num_samples=(1000, 30), counts=(40000, 25536), seed=5)
    whole = order.samples(np.arange(3 * BLOCK))
    for first in (0, 17, BLOCK - 5, 2 * BLOCK + 1):
        assert (order.samples(np.arange(first, first + 100)) == whole[first : first + 100]).all()
    with pytest.raises(ValueError, match="positions start at 0"):
        order.samples(np.array([-1]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mixture_order__any_world_size__reads_the_rows_of_one_worker(world_size: int) -> None:
    order = MixtureOrder(num_samples=(100, 30), counts=(6, 3), seed=5)
    plan = plan_batch(12, world_size=world_size, max_micro_batch_size=2)
    seen = [
        position for step in range(30) for rank in range(world_size)
        for position in range(step * 12 + plan.share(rank)[0], step * 12 + plan.share(rank)[1])
    ]  # fmt: skip
    assert (order.samples(np.array(seen)) == order.samples(np.arange(360))).all()


def test_block_counts__weights__are_rounded_by_the_largest_remainder(files: dict[str, Path]) -> None:
    def counts(*weights: float) -> tuple[int, ...]:
        names = ("large", "small")
        shares = {name: {"weight": weight} for name, weight in zip(names, weights, strict=True)}
        return block_counts(spec_of(files, shares=shares), num_sequences=(10, 10))

    assert counts(1, 2) == (21845, 43691)
    assert counts(0.7, 0.3) == counts(7, 3) == (45875, 19661)
    assert sum(counts(1e9, 0.01e9)) == BLOCK


def test_block_counts__a_weight_too_small_for_one_sequence__names_the_key(files: dict[str, Path]) -> None:
    spec = spec_of(files, shares={"large": {"weight": 1e6}, "small": {"weight": 1}})
    with pytest.raises(PlanError, match="gives part small none of 65,536 sequences") as caught:
        block_counts(spec, num_sequences=(10, 10))
    assert caught.value.job_key == "data.mixture[1].weight"


@pytest.mark.parametrize("given", [{"large": {}, "small": {}}, {"large": {"passes": 1}, "small": {"passes": 3}}])
def test_passes__an_epoch__reads_each_row_exactly_so_often(
    files: dict[str, Path], given: Any, facts: CorpusInfo
) -> None:
    spec = spec_of(files, shares=given)
    order, length = build_order(spec, facts), epoch_sequences(spec, facts)
    large, small = (part.corpus.num_train_sequences for part in facts.parts)
    passes = given["small"].get("passes", 1)
    assert length == large + passes * small
    assert np.bincount(order.samples(np.arange(length))).tolist() == [1] * large + [passes] * small
    assert [one.passes(2 * length) for one in part_shares(spec, facts)] == pytest.approx([2, 2 * passes])


# ---- what is prepared


def test_prepare_corpus__mixture__has_the_rows_of_every_part_prepared_alone(
    files: dict[str, Path], cache: Path, facts: CorpusInfo
) -> None:
    train, held_out = open_rows(facts)
    assert isinstance(train, MixedRows) and isinstance(held_out, MixedRows)
    assert train.num_rows == facts.num_train_sequences
    assert held_out.num_rows == facts.num_held_out_sequences > 1
    first = 0
    for part in facts.parts:
        alone, _ = open_rows(part.corpus)
        rows = np.arange(alone.num_rows)
        for name, values in alone.read(rows).items():
            assert (train.read(rows + first)[name] == values).all()
        assert (train.weights(rows + first) == alone.weights(rows)).all()
        first += alone.num_rows
    mixed = np.array([first - 1, 0, first // 2])
    assert (train.read(mixed)["tokens"][1] == train.read(np.array([0]))["tokens"][0]).all()
    assert train.read(mixed[:0])["tokens"].shape == (0, 16)
    with pytest.raises(IndexError):
        train.read(np.array([first]))
    assert {(Path(part.corpus.folder) / "index.json").stat().st_nlink for part in facts.parts} == {2}


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_train_batches__mixture_at_any_world_size__have_the_rows_and_totals_of_one_worker(
    files: dict[str, Path], facts: CorpusInfo, world_size: int
) -> None:
    rows, order = open_rows(facts)[0], build_order(spec_of(files), facts)

    def seen(size: int) -> list[Any]:
        plan = plan_batch(10, world_size=size, max_micro_batch_size=2)
        ranks = [TrainBatches(rows=rows, order=order, plan=plan, rank=rank) for rank in range(size)]
        taken = [(b, at) for step in (1, 9) for rank in ranks for b in rank.of_step(step) for at in range(2)]
        return [
            *((int(b.positions[at]), b.arrays["tokens"][at].tolist()) for b, at in taken if b.positions[at] >= 0),
            *{rank.totals(step) for step in (1, 9) for rank in ranks},
        ]

    assert seen(world_size) == seen(1)


def test_prepare_corpus__other_weights__prepares_nothing_again(
    files: dict[str, Path], cache: Path, facts: CorpusInfo
) -> None:
    phases: list[str] = []
    spec = spec_of(files, shares={"large": {"weight": 1}, "small": {"weight": 20}})
    found = prepare_corpus(spec, cache_dir=cache, on_progress=lambda progress: phases.append(progress.phase))
    assert found == facts
    assert set(phases) == {"fingerprint"}
    assert find_corpus(spec, cache_dir=cache) == facts
    assert find_corpus(spec_of(files, seq_len=32, held_out=0.2), cache_dir=cache) is None


def test_prepare_corpus__a_part_more__prepares_that_part_alone(
    files: dict[str, Path], tmp_path: Path, facts: CorpusInfo
) -> None:
    tokenizer = {"from_pretrained": f"{facts.folder}/tokenizer"}
    first = prepare_corpus(spec_of(files, shares={"large": {}}, tokenizer=tokenizer), cache_dir=tmp_path)
    both = prepare_corpus(spec_of(files, tokenizer=tokenizer), cache_dir=tmp_path)
    assert both.parts[0] == first.parts[0]
    alone = prepare(spec_of(files, tokenizer=tokenizer).parts[1], cache_dir=tmp_path)
    assert both.parts[1].corpus == alone


def test_mixture__a_damaged_link__is_made_again(files: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_of(files)
    facts = prepare_corpus(spec, cache_dir=tmp_path)
    shard = next(Path(facts.folder).glob("parts/small/train-*.tokens"))
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match="the index says"):
        open_rows(facts)
    assert prepare_corpus(spec, cache_dir=tmp_path) == facts
    assert shard.read_bytes() == content


def test_fetch_corpus__mixture__arrives_with_all_parts(facts: CorpusInfo, tmp_path: Path) -> None:
    source, target = Path(facts.folder), tmp_path / "data" / "copy"
    fetch_corpus(
        target, digest=facts.digest, read=lambda name, offset: read_chunk(source, name=name, offset=offset)
    )
    here, there = open_rows(facts)[0], open_rows(replace(facts, folder=str(target)))[0]
    rows = np.arange(here.num_rows)
    assert (here.read(rows)["tokens"] == there.read(rows)["tokens"]).all()


@pytest.mark.parametrize("link", ["parts", "parts/small", "tokenizer"])
def test_read_chunk__through_a_linked_folder__is_refused(facts: CorpusInfo, tmp_path: Path, link: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(facts.folder, folder)
    (folder / link).rename(tmp_path / "elsewhere")
    (folder / link).symlink_to(tmp_path / "elsewhere")
    below = next(path for path in sorted((tmp_path / "elsewhere").rglob("*.json")))
    name = f"{link}/{below.relative_to(tmp_path / 'elsewhere')}"
    name = name if link != "parts" else "parts/small/index.json"
    with pytest.raises(DataError, match="its folder is a link"):
        read_chunk(folder, name=name, offset=0)


def test_open_rows__another_mixture_than_planned__is_refused(facts: CorpusInfo, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="other parts"):
        open_rows(replace(facts, parts=tuple(reversed(facts.parts))))


def test_mix__numbers__are_sums(facts: CorpusInfo) -> None:
    for name in ("num_documents", "num_train_tokens", "num_train_sequences", "num_held_out_tokens"):
        assert getattr(facts, name) == sum(getattr(part.corpus, name) for part in facts.parts)
    assert 1 < facts.unigram_perplexity < 300
    assert not math.isnan(facts.padding)


def test_held_out_of_run__mixture__gives_the_records_of_every_part(
    files: dict[str, Path], facts: CorpusInfo
) -> None:
    found = [str(one.fields["text"]) for one in held_out_of_run(spec_of(files), folder=Path(facts.folder))]
    count = sum(text.startswith("large") for text in found)
    assert count >= 10 and len(found) - count >= 2


def test_training_texts__mixture__have_the_text_of_every_part(facts: CorpusInfo) -> None:
    text = "".join(training_texts(Path(facts.folder)))
    assert text.count("little") > 40 and text.count("large") > 240


def test_prepare_corpus__labelled_parts__number_labels_alike(tmp_path: Path) -> None:
    records = {"first": [("good", "up"), ("fine", "up"), ("bad", "down")], "second": [("poor", "down")] * 3}
    for name, rows in records.items():
        lines = (json.dumps({"text": f"{text} {i}", "label": label}) for i, (text, label) in enumerate(rows * 9))
        (tmp_path / name).write_text("\n".join(lines))
    spec = spec_of(
        {name: tmp_path / name for name in records},
        shares={name: {} for name in records},
        format="labelled",
        labels={"kind": "single", "names": ["up", "down"]},
    )
    facts = prepare_corpus(spec, cache_dir=tmp_path)
    assert facts.labels is not None
    counts = [up + other for up, other in zip(facts.labels.train_counts, facts.labels.held_out_counts, strict=True)]
    assert (facts.labels.names, counts) == (("up", "down"), [18, 36])
    assert facts.num_examples == 54 and open_rows(facts)[0].num_rows == facts.num_train_sequences


# ---- what is wrong


def test_prepare_corpus__a_part_without_text__is_named(files: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    spec = spec_of({**files, "small": empty}, tokenizer={"vocab_size": 300})
    with pytest.raises(DataError, match=r"^data.mixture\[1\]: part small: the corpus has no text"):
        prepare_corpus(spec, cache_dir=tmp_path)


def test_prepare_corpus__a_part_shorter_than_a_sequence__is_named(files: dict[str, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b")
    with pytest.raises(DataError, match=r"^data.mixture\[1\]: part small: the corpus has .* data.seq_len"):
        prepare_corpus(spec_of({**files, "small": short}), cache_dir=tmp_path)


def test_look_at_corpus__a_file_in_two_parts__is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"^data.mixture\[1\]: part small: .*large.jsonl is in part large too"):
        look_at_corpus(spec_of({"large": files["large"], "small": files["large"].parent / "l*.jsonl"}))


def test_look_at_corpus__a_file_under_two_names__is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").symlink_to(files["large"])
    with pytest.raises(DataError, match=r"other.jsonl is in part large too"):
        look_at_corpus(spec_of({"large": files["large"], "small": tmp_path / "other.jsonl"}))
    spec = spec_of(files).model_dump(mode="json")
    spec["mixture"] = [{"name": name, "source": "python-stdlib"} for name in ("a", "b")]
    with pytest.raises(DataError, match=r"^data.mixture\[1\]: part b: .* is in part a too"):
        look_at_corpus(DataSpec.model_validate(spec))


def test_look_at_corpus__mixture__lists_the_files_of_every_part(files: dict[str, Path]) -> None:
    found = look_at_corpus(spec_of(files))
    assert [pattern.pattern.partition(":")[0] for pattern in found.patterns] == ["large", "small"]
    assert found.num_files == 2


def test_mix__parts_with_other_arrays__are_refused(files: dict[str, Path], cache: Path, facts: CorpusInfo) -> None:
    examples = prepare_corpus(spec_of(files, packing="examples"), cache_dir=cache)
    with pytest.raises(DataError, match="have the arrays"):
        mix([facts.parts[0], examples.parts[1]], home=cache / "data")


# ---- what is shown


def test_view_data__mixture__shows_share_and_passes_of_every_part(
    files: dict[str, Path], facts: CorpusInfo
) -> None:
    view = view_data(facts, data=spec_of(files), objective=LM, num_positions=400)
    large, small = view.parts
    assert (large.asked, small.asked) == (0.75, 0.25)
    assert small.view.passes == pytest.approx(100 / facts.parts[1].corpus.num_train_sequences)
    assert {example.of_part for example in view.examples} == {"large", "small"}
    assert view.num_sequences == facts.num_train_sequences
    assert large.view.lengths is not None and view.lengths is None


def test_view_data__a_selection_of_a_mixture__needs_a_part_for_an_index(
    files: dict[str, Path], facts: CorpusInfo
) -> None:
    def view(**selection: Any) -> list[tuple[str | None, int]]:
        found = view_data(facts, data=spec_of(files), objective=LM, selection=Selection(**selection))
        return [(example.of_part, example.index) for example in found.examples]

    assert view(part="small", index=3, count=2) == [("small", 3), ("small", 4)]
    assert [part for part, _ in view(count=5)] == ["large"] * 3 + ["small"] * 2
    assert [part for part, _ in view(count=1)] == ["large"]
    with pytest.raises(ArgumentError, match="--part: large, small"):
        view(index=3)
    with pytest.raises(ArgumentError, match="the parts are large, small"):
        view(part="other")
