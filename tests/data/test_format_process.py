"""forge.data.format_process: examples of the user's own format are prepared in a subprocess."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from forge.code_archive import PackedCode, unpack_code
from forge.config.data import DataSpec
from forge.data.prepare import PrepareProgress, open_rows, prepare
from forge.errors import DataError, UserCodeError

FORMAT = """\
import os
import my_words
from forge.data.formats.base import Example

print("imported")

class Reviews:
    def __init__(self, context):
        self._context = context

    def examples(self, record):
        ids = self._context.encode(record.fields["review"])
        yield Example(arrays={"tokens": ids[:-1], "targets": ids[1:]}, weight=float(len(ids) - 1))

    def counts(self):
        return {my_words.REASON: os.getpid()}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of reviews; the current folder has modules that must not be imported."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_words.py").write_text("raise OSError('imported from the current folder')\n")
    lines = [json.dumps({"review": f"the film number {number} was good"}) for number in range(2000)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines))
    return tmp_path


def unpacked(text: str) -> str:
    code = PackedCode(files={"my_data.py": text.encode(), "my_words.py": b"REASON = 'process'\n"})
    unpack_code(code)
    return code.digest


def spec_of(home: Path) -> DataSpec:
    return DataSpec(
        files=(str(home / "reviews.jsonl"),),
        text_key="review",
        format="my_data:Reviews",
        packing="examples",
        tokenizer={"vocab_size": 300},
        seq_len=64,
    )


def test_prepare__format_of_the_users__runs_in_another_process(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[PrepareProgress] = []
    facts = prepare(spec_of(home), cache_dir=home / "cache", code_digest=unpacked(FORMAT), on_progress=seen.append)
    assert facts.notes["process"] not in (0, os.getpid())
    assert "my_data" not in sys.modules
    assert facts.num_examples == facts.num_documents == 2000
    assert [progress.num_documents for progress in seen if progress.phase == "tokens"] == [1000, 2000]
    assert open_rows(facts)[0].num_rows == facts.num_train_sequences
    out, err = capfd.readouterr()
    assert (out, err.count("imported")) == ("", 1)  # what user code prints must not mix with `--output json`


@pytest.mark.parametrize(
    ("old", "new", "error", "problem"),
    [
        (
            '"review"',
            '"stars"',
            DataError,
            r"\.jsonl:1 \(format Reviews\): my_data\.py:12: KeyError: 'stars'",
        ),
        ("(self, context)", "(self)", UserCodeError, r"TypeError: .*__init__\(\) takes 1 positional argument"),
        ("self._context = context", "os.abort()", DataError, r"my_data:Reviews ended its process \(SIGABRT\)"),
        ("yield", "os._exit(7); yield", DataError, r"my_data:Reviews ended its process \(exit status 7\)"),
    ],
)
def test_prepare__format_that_fails__raises_and_leaves_no_cache(
    home: Path, old: str, new: str, error: type[Exception], problem: str
) -> None:
    assert old in FORMAT
    with pytest.raises(error, match=problem):
        prepare(spec_of(home), cache_dir=home / "cache", code_digest=unpacked(FORMAT.replace(old, new)))
    assert not list((home / "cache" / "data").glob("reviews-*"))


def test_prepare__folder_cannot_be_written__keeps_the_reason(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = FORMAT.replace("self._context = context", "raise OSError(28, 'No space left on device', 'a')")
    with pytest.raises(UserCodeError, match=r"my_data\.py:9: OSError"):  # the user's own error is no full disk
        prepare(spec_of(home), cache_dir=home / "cache", code_digest=unpacked(full))
    limited = FORMAT.replace(
        "self._context = context",
        "self._context = context; import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))",
    )
    with pytest.raises(DataError, match="a shard exceeds the largest file allowed here"):
        prepare(spec_of(home), cache_dir=home / "cache", code_digest=unpacked(limited))


def test_prepare__interrupted__ends_the_subprocess(home: Path) -> None:
    def interrupt(progress: PrepareProgress) -> None:
        if progress.phase == "tokens":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(home), cache_dir=home / "cache", code_digest=unpacked(FORMAT), on_progress=interrupt)
    assert not [child for child in psutil.Process().children() if "forge.data.format_process" in child.cmdline()]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
