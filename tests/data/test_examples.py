"""Examples from records to rows: `packing: examples` and `none`."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.code_archive import PackedCode, unpack_code
from forge.config.data import ChatSpec, DataSpec
from forge.data import cache_index, prepare_examples
from forge.data.example_store import ExampleRows, ExampleWriter
from forge.data.formats.base import Example, FormatContext
from forge.data.formats.build import build_format
from forge.data.formats.registry import FORMATS
from forge.data.prepare import open_rows, prepare
from forge.data.rows import IGNORED
from forge.data.sources.base import Record
from forge.data.store import checksum
from forge.data.tokenizer import train_tokenizer
from forge.errors import DataError, UserCodeError
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import make_plan
from forge.user_code import use_code
from tests.support.jobs import CPU, tiny_facts, tiny_job

SEQ_LEN = 16


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    path: Path = tmp_path_factory.mktemp("records") / "a.jsonl"
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 12))) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(texts)))
    return path


def spec_of(path: Path, **changes: Any) -> DataSpec:
    body = {"files": (str(path),), "tokenizer": {"vocab_size": 300}, "seq_len": SEQ_LEN, "packing": "examples"}
    return DataSpec(**body | {"held_out": 0.1} | changes)


def prepared(path: Path, folder: Path, **changes: Any) -> tuple[CorpusInfo, list[ExampleRows]]:
    facts = prepare(spec_of(path, **changes), cache_dir=folder)
    rows = [side for side in open_rows(facts) if isinstance(side, ExampleRows)]
    assert len(rows) == 2
    return facts, rows


def examples_in(side: ExampleRows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and targets of every example, whole."""
    arrays = side.read(np.arange(side.num_rows))
    found = []
    for row in range(side.num_rows):
        segments = arrays["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert arrays["position_ids"][row][inside].tolist() == list(range(inside.sum()))
            found.append(tuple(tuple(arrays[name][row][inside].tolist()) for name in ("tokens", "targets")))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("packing", ["examples", "none"])
def test_prepare__text__every_example_once_and_the_rest_is_padding(
    records: Path, tmp_path: Path, packing: str
) -> None:
    facts, (train, held_out) = prepared(records, tmp_path, packing=packing)
    assert len(examples_in(train)) + len(examples_in(held_out)) == facts.num_examples
    for side in (train, held_out):
        arrays = side.read(np.arange(side.num_rows))
        padding = arrays["segment_ids"] == 0
        assert (arrays["targets"][padding] == IGNORED).all()
        assert (arrays["targets"][~padding] >= 0).all()
        assert (arrays["tokens"][padding] == 0).all()
        assert side.weights(np.arange(side.num_rows)).tolist() == (~padding).sum(axis=1).tolist()
        assert side.num_targets(np.arange(side.num_rows)).tolist() == (~padding).sum(axis=1).tolist()
        assert side.num_tokens(np.arange(side.num_rows)).tolist() == (~padding).sum(axis=1).tolist()
    share = (train.read(np.arange(train.num_rows))["segment_ids"] == 0).mean()
    assert facts.padding == pytest.approx(share)
    assert (facts.num_train_sequences, facts.num_held_out_sequences) == (train.num_rows, held_out.num_rows)


def test_prepare__both_packings__the_same_examples(records: Path, tmp_path: Path) -> None:
    packed, (packed_train, packed_held_out) = prepared(records, tmp_path)
    padded, (padded_train, padded_held_out) = prepared(records, tmp_path, packing="none")
    assert sorted(examples_in(packed_train)) == sorted(examples_in(padded_train))
    assert sorted(examples_in(packed_held_out)) == sorted(examples_in(padded_held_out))
    assert packed.num_train_sequences < padded.num_train_sequences
    assert packed.padding < 0.1 < padded.padding
    assert packed.unigram_perplexity == padded.unigram_perplexity


def test_prepare__twice_in_other_folders__the_same_bytes(records: Path, tmp_path: Path) -> None:
    folders = [Path(prepared(records, tmp_path / name)[0].folder) for name in ("a", "b")]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.bin")) for folder in folders]
    assert files[0] == files[1]
    assert len(files[0]) == 13
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_prepare__another_seq_len_or_packing__another_cache(records: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seq_len": 32},
        {"packing": "none"},
        {"packing": "concatenate"},
        {"seed": 2},
    ]
    digests = {prepare(spec_of(records, **change), cache_dir=tmp_path).digest for change in changes}
    assert len(digests) == len(changes)


def test_prepare__document_longer_than_seq_len__is_split_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 200)
    (tmp_path / "b.txt").write_text("short")
    facts, sides = prepared(tmp_path / "*.txt", tmp_path, held_out=0)
    assert facts.notes == {"documents split at seq_len": 1}
    found = [example for side in sides for example in examples_in(side)]
    assert max(len(tokens) for tokens, _ in found) == SEQ_LEN
    tokens_of_long = sorted(found, key=lambda example: -len(example[0]))
    assert all(tokens[1:] == targets[:-1] for tokens, targets in tokens_of_long)
    # n tokens with the end-of-text token predict n - 1; no piece loses one.
    assert facts.num_train_tokens == sum(len(targets) for _, targets in found)


def test_prepare__empty_texts__are_counted_and_left_out(tmp_path: Path) -> None:
    lines = [{"text": "some words"}, {"text": ""}, {"text": "more words"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts, sides = prepared(tmp_path / "a.jsonl", tmp_path, held_out=0)
    assert (facts.num_documents, facts.num_examples) == (3, 2)
    assert facts.notes == {"records without an example": 1}
    assert sides[1].num_rows == 0


def test_prepare__one_record__holds_out_its_last_examples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 2000)
    facts, (train, held_out) = prepared(tmp_path / "a.txt", tmp_path)
    assert len(examples_in(held_out)) == -(-facts.num_examples // 10)
    assert train.num_rows > 0


def test_prepare__copies_of_a_record__fall_on_the_same_side(tmp_path: Path) -> None:
    lines = [{"text": f"text number {i}"} for i in range(40)] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, sides = prepared(tmp_path / "a.jsonl", tmp_path)
    train, held_out = (set(examples_in(side)) for side in sides)
    assert held_out
    assert not train & held_out


def test_prepare__interrupted__leaves_nothing_and_succeeds_afterwards(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_examples, "write_rows", interrupt)
        prepare(spec_of(records), cache_dir=tmp_path)
    assert [path for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == []
    assert prepare(spec_of(records), cache_dir=tmp_path).num_examples > 0


def test_open_rows__a_table_is_cut_off__names_the_file(records: Path, tmp_path: Path) -> None:
    facts, _ = prepared(records, tmp_path)
    path = Path(facts.folder) / "train" / "row_weights.bin"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"row_weights\.bin has \d+ bytes, the index says"):
        open_rows(facts)


def test_prepare__a_damaged_cache__is_built_again(records: Path, tmp_path: Path) -> None:
    facts, _ = prepared(records, tmp_path)
    path = Path(facts.folder) / "columns" / "tokens.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    prepare(spec_of(records), cache_dir=tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", [{"vocab_size": None}, {"examples": {"columns": None}}])
def test_prepare__an_index_with_null_values__is_built_again(
    records: Path, tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    facts, _ = prepared(records, tmp_path)
    path = Path(facts.folder) / "index.json"
    original = path.read_bytes()
    body = json.loads(original) | change
    del body["blake2b"], body["format"]
    sound = checksum(cache_index._canonical(body))
    path.write_text(json.dumps({"format": cache_index.FORMAT_VERSION, "blake2b": sound, **body}))
    with pytest.raises(DataError, match=r"index\.json is not the index of a token cache"):
        open_rows(facts)
    assert prepare(spec_of(records), cache_dir=tmp_path) == facts
    assert path.read_bytes() == original
    assert "the token cache is damaged and is built again" in caplog.text


def test_rows__pickled_and_moved__read_the_same(records: Path, tmp_path: Path) -> None:
    facts, (train, _) = prepared(records, tmp_path)
    before = train.read(np.arange(3))
    assert len(pickle.dumps(train)) < 10_000
    after = pickle.loads(pickle.dumps(train)).read(np.arange(3))
    assert all((before[name] == after[name]).all() for name in before)
    shutil.copytree(facts.folder, tmp_path / "moved")
    moved = open_rows(replace(facts, folder=str(tmp_path / "moved")))[0].read(np.arange(3))
    assert all((before[name] == moved[name]).all() for name in before)


def test_rows__an_index_outside__is_refused(records: Path, tmp_path: Path) -> None:
    _, (train, _) = prepared(records, tmp_path)
    with pytest.raises(IndexError, match="rows run from 0 to"):
        train.read(np.array([train.num_rows]))


@dataclass
class Scored:
    """A format with a vector per position and a weight of its own."""

    context: FormatContext

    def examples(self, record: Record) -> Iterator[Example]:
        ids = self.context.encode(record.fields["text"])[: self.context.seq_len]
        targets = np.full(len(ids), IGNORED)
        targets[-1] = record.fields["label"]
        vectors = np.outer(ids, [0.5, 1.0, 2.0]).astype(np.float32)
        weight = float(record.fields["label"] != 0)
        yield Example(arrays={"tokens": ids, "targets": targets, "vectors": vectors}, weight=weight)

    def counts(self) -> dict[str, int]:
        return {"texts shortened": 7}


def test_prepare__a_format_with_more_arrays_and_weights__keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "scored", f"{__name__}:Scored")
    lines = [{"text": f"text number {i}", "label": i % 3} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts, (train, _) = prepared(tmp_path / "a.jsonl", tmp_path, format="scored", held_out=0, seq_len=64)
    assert facts.notes == {"examples of weight 0 dropped": 20, "texts shortened": 7}
    assert facts.num_examples == 40
    rows = np.arange(train.num_rows)
    arrays = train.read(rows)
    assert arrays["vectors"].shape == (train.num_rows, 64, 3)
    inside = arrays["segment_ids"] > 0
    assert (arrays["vectors"][inside] == arrays["tokens"][inside][:, None] * [0.5, 1.0, 2.0]).all()
    assert (arrays["vectors"][~inside] == 0).all()
    assert train.weights(rows).sum() == train.num_targets(rows).sum() == 40
    assert train.num_tokens(rows).sum() == inside.sum() > 40
    assert np.isnan(facts.unigram_perplexity)


def test_prepare__no_example_with_a_weight__is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "scored", f"{__name__}:Scored")
    (tmp_path / "a.jsonl").write_text('{"text": "some text", "label": 0}\n' * 3)
    with pytest.raises(
        DataError, match=r"no training example .*: 3 examples of .* 0 dropped \(the first: .*:1\), 7 texts"
    ):
        prepared(tmp_path / "a.jsonl", tmp_path, format="scored")


@pytest.mark.parametrize(
    ("changes", "weight", "message"),
    [
        ({}, float("nan"), "an example has the weight nan; it must be above 0 and finite"),
        ({}, -1.0, "an example has the weight -1.0"),
        ({"targets": None}, 1.0, "the format made an example without 'targets'"),
        (
            {"tokens": np.arange(17), "targets": np.arange(17)},
            1.0,
            "an example of 17 positions does not fit into a row",
        ),
        ({"tokens": np.arange(0), "targets": np.arange(0)}, 1.0, "an example of 0 positions"),
        ({"targets": np.arange(3)}, 1.0, r"array 'targets' is int64\[3\]; it must have numbers for each of the 4"),
        ({"extra": np.array(list("abcd"))}, 1.0, "array 'extra' is <U1"),
        ({"tokens": np.array([1, 2, 3, 300])}, 1.0, r"token ids must be in 0\.\.299"),
        ({"extra": np.arange(4)}, 1.0, "differ from those of the first example"),
    ],
)
def test_writer__an_invalid_example__names_the_record(
    tmp_path: Path, changes: dict[str, Any], weight: float, message: str
) -> None:
    writer = ExampleWriter(tmp_path, seq_len=16, vocab_size=300)
    good = {"tokens": np.arange(4), "targets": np.arange(4)}
    writer.add(Example(arrays=good, weight=4.0), key=0, location="a.jsonl:1")
    arrays = {name: values for name, values in (good | changes).items() if values is not None}
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        writer.add(Example(arrays=arrays, weight=weight), key=0, location="a.jsonl:2")
    writer.abort()


def test_build_format__every_registered_name__has_the_methods() -> None:
    tokenizer = replace(train_tokenizer(["a"], vocab_size=300), files={"chat_template.jinja": "{{ messages }}"})
    context = FormatContext(
        seq_len=16,
        text_key="text",
        eot_id=0,
        vocab_size=300,
        encode=lambda text: np.arange(len(text)),
        tokenizer=tokenizer,
    )
    for name in FORMATS:
        assert callable(build_format(name, context=context).examples)


def test_data__concatenate_with_a_format_of_ones_own__is_refused() -> None:
    with pytest.raises(ValueError, match="must be examples or none with format my_data:Reviews"):
        DataSpec(source="python-stdlib", format="my_data:Reviews", packing="concatenate")


def test_data__packing_left_out__follows_the_format() -> None:
    assert DataSpec(source="python-stdlib").packing == "concatenate"
    assert DataSpec(source="python-stdlib", format="my_data:Reviews").packing == "examples"
    assert DataSpec(files=("a.jsonl",), format="chat", packing="none").packing == "none"


def test_data__chat_settings_of_another_format__are_refused() -> None:
    with pytest.raises(ValueError, match="is only for format: chat or preference, not text"):
        DataSpec(source="python-stdlib", chat=ChatSpec(turns="last"))


@pytest.mark.parametrize("name", ["txt", "my data:Reviews", "a:b:c"])
def test_data__an_unknown_format__is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        DataSpec(source="python-stdlib", format=name, packing="none")


_VALID = {"tokens": np.array([1, 2]), "targets": np.array([2, IGNORED])}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"../../PWN": [1, 2]}, "cannot name an array"),
        ({"segment_ids": [1, 2]}, "reserved"),
        ({"targets": [1.0, 2.0]}, "one integer per position"),
        ({"targets": [1, -3]}, "targets must be -100"),
        ({"tokens": [[1], [2]]}, "one integer per position"),
        ({"extra": [1, 1 << 40]}, "do not fit into int32"),
        ({"extra": [1.0, float("nan")]}, "not finite"),
        ({"extra": [1.0, 1e300]}, "not finite"),
        ({"extra": np.zeros((2, 0))}, "no values"),
        ({"extra": [[1], [1, 2]]}, "numpy cannot build"),
    ],
)
def test_writer__arrays_that_cannot_be_stored__are_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    writer = ExampleWriter(tmp_path, seq_len=4, vocab_size=10)
    with pytest.raises(DataError, match=message):
        writer.add(Example(arrays=_VALID | arrays, weight=1.0), key=0, location="a:1")
    assert list(tmp_path.iterdir()) == []


def test_writer__floats_after_integers__are_refused(tmp_path: Path) -> None:
    writer = ExampleWriter(tmp_path, seq_len=4, vocab_size=10)
    writer.add(Example(arrays=_VALID | {"score": np.array([1, 2])}, weight=1.0), key=0, location="a:1")
    with pytest.raises(DataError, match="a:2: array 'score' is float64, that of the first example is int32"):
        writer.add(Example(arrays=_VALID | {"score": np.array([0.5, 2])}, weight=1.0), key=0, location="a:2")
    writer.abort()


@dataclass
class Failing:
    """A format that fails on its first record."""

    context: FormatContext

    def examples(self, record: Record) -> Iterator[Example]:
        raise KeyError("label")

    def counts(self) -> dict[str, int]:
        return {}


def test_prepare__a_format_that_raises__names_class_record_and_line(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "failing", f"{__name__}:Failing")
    with pytest.raises(DataError, match=r"\(format Failing\): test_examples\.py:\d+: KeyError"):
        prepare(spec_of(records, format="failing"), cache_dir=tmp_path)


@pytest.fixture
def user_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Packs a `my_data.py`, given its text, and returns the arguments of `prepare` for its class Reviews."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))

    def pack(text: str) -> dict[str, Any]:
        code = PackedCode(files={"my_data.py": text.encode()})
        unpack_code(code)
        return {"code_digest": code.digest, "cache_dir": tmp_path / "cache"}

    yield pack
    use_code(None)


REVIEWS = """\
import json
from forge.data.formats.base import Example

class Reviews:
    def __init__(self, context):
        self._context = context

    def examples(self, record):
        ids = self._context.encode(record.fields["text"])[:9]
        yield Example(arrays={"tokens": ids[:-1], "targets": ids[1:]}, weight=float(len(ids) - 1))

    def counts(self):
        return {}
"""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("        ids = json.loads('{')", r"my_data\.py:9: JSONDecodeError"),
        ("        ids = self._context.encode(7)", r"my_data\.py:9: TypeError"),
        ("        ids = sorted([1], key=lambda one: one.rank)", r"my_data\.py:9: AttributeError"),
    ],
)
def test_prepare__user_format_that_fails_in_a_library__names_the_users_line(
    records: Path, user_format: Callable[[str], dict[str, Any]], line: str, problem: str
) -> None:
    lines = REVIEWS.splitlines()
    lines[8] = line
    with pytest.raises(DataError, match=rf"a\.jsonl:1 \(format Reviews\): {problem}"):
        prepare(spec_of(records, format="my_data:Reviews"), **user_format("\n".join(lines)))


def test_prepare__user_format_that_cannot_be_built__names_the_users_line(
    records: Path, user_format: Callable[[str], dict[str, Any]]
) -> None:
    text = REVIEWS.replace("self._context = context", "self._context = json.loads('{')")
    with pytest.raises(UserCodeError, match=r"my_data\.py:6: JSONDecodeError"):
        prepare(spec_of(records, format="my_data:Reviews"), **user_format(text))


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ("{'long': 1.5}", r"Reviews\.counts has 1\.5 \(float\) for 'long'; it must be a whole number"),
        ("{'long': '3'}", r"has '3' \(str\) for 'long'"),
        ("{'long': True}", r"has True \(bool\)"),
        ("{'long': None}", r"has None \(NoneType\)"),
        ("{'long': -1}", r"has -1 \(int\)"),
        ("{3: 1}", "has the key 3; it must be text"),
        ("{'records without an example': 1}", "none of forge's own reasons"),
        ("[1]", r"Reviews\.counts must return a mapping from each reason to a whole number, not list"),
        ("None", "not NoneType"),
        ("json.loads('{')", r"Reviews\.counts: my_data\.py:13: JSONDecodeError"),
    ],
)
def test_prepare__counts_that_are_no_whole_numbers__are_refused_with_the_class(
    records: Path, user_format: Callable[[str], dict[str, Any]], counts: str, problem: str
) -> None:
    text = REVIEWS.replace("return {}", f"return {counts}")
    with pytest.raises(DataError, match=problem):
        prepare(spec_of(records, format="my_data:Reviews"), **user_format(text))


def test_prepare__counts_of_numpy__become_ints(records: Path, user_format: Callable[[str], dict[str, Any]]) -> None:
    text = REVIEWS.replace("return {}", "import numpy; return {'long': numpy.int64(3)}")
    facts = prepare(spec_of(records, format="my_data:Reviews"), **user_format(text))
    assert facts.notes == {"long": 3}
    assert type(facts.notes["long"]) is int


def test_prepare__examples_that_are_not_iterable__are_refused_with_the_class(
    records: Path, user_format: Callable[[str], dict[str, Any]]
) -> None:
    text = REVIEWS.replace("yield", "return")
    with pytest.raises(DataError, match=r"jsonl:1 \(format Reviews\): examples must give an iterable"):
        prepare(spec_of(records, format="my_data:Reviews"), **user_format(text))


def test_make_plan__target_beyond_the_vocabulary__is_refused_where_tokens_are_predicted(
    records: Path, user_format: Callable[[str], dict[str, Any]]
) -> None:
    text = REVIEWS.replace("ids[1:]}", "ids[1:] + 300 * record.location.endswith(':7')}")
    arguments = user_format(text)
    corpus = prepare(spec_of(records, format="my_data:Reviews"), **arguments)
    facts = tiny_facts(vocab_size=corpus.vocab_size)
    job = tiny_job(data__packing="examples", data__format="my_data:Reviews", code="./src")
    message = (
        r"a\.jsonl:7 \(format Reviews\): the target \d+ is no token id, but training\.objective causal-lm predicts "
        rf"tokens: targets must be in 0\.\.{corpus.vocab_size - 1}, or -100"
    )
    for found in (corpus, prepare(spec_of(records, format="my_data:Reviews"), **arguments)):  # built, then cached
        with pytest.raises(DataError, match=message):
            make_plan(job, model=facts, corpus=found, hardware=CPU)
    own = tiny_job(
        data__packing="examples", data__format="my_data:Reviews", code="./src", training__objective="my:Ranking"
    )
    assert make_plan(own, model=facts, corpus=corpus, hardware=CPU).corpus == corpus


def test_prepare__targets_that_are_token_ids__have_no_foreign_one(records: Path, tmp_path: Path) -> None:
    assert prepared(records, tmp_path)[0].foreign_target is None
