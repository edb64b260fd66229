from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.cli.options import complete_run
from forge.errors import ArgumentError
from forge.runs import index
from forge.runs.annotations import ANNOTATIONS, change_tags, read_annotations, set_note
from forge.runs.delete import delete_run
from forge.runs.index import forget_runs, read_index, remember_run
from forge.runs.lock import LOCK
from forge.runs.reader import find_run, summary_record
from tests.support.runs import make_run


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder, and an empty current folder."""
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "state"


def forge(*arguments: str) -> tuple[int, str]:
    """Run a command in this process. Returns: its exit code, and what it printed or raised."""
    done = CliRunner().invoke(app, list(arguments))
    is_message = isinstance(done.exception, (ArgumentError, SystemExit, type(None)))
    assert is_message, done.exception
    code = 2 if isinstance(done.exception, ArgumentError) else done.exit_code
    return code, f"{done.output} {done.exception or ''}"


class TestIndex:
    def test_find_run__used_before__is_found_by_id_and_prefix_from_any_folder(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path / "elsewhere", "tiny-0101-1")
        with pytest.raises(ArgumentError, match="holds no runs"):
            find_run("tiny-0101-1", root=Path("runs"))
        find_run(str(folder), root=Path("runs"))
        assert find_run("tiny-0101-1", root=Path("runs")) == folder
        assert find_run("tiny", root=Path("runs")) == folder

    def test_find_run__id_in_two_folders__names_both_paths(self, tmp_path: Path) -> None:
        for parent in ("a", "b"):
            remember_run(make_run(tmp_path / parent, "tiny-1"))
        with pytest.raises(ArgumentError, match=r"could be any of 2 runs: .*/b/tiny-1, .*/a/tiny-1"):
            find_run("tiny-1", root=Path("runs"))

    def test_find_run__trial_of_a_known_search__is_found(self, tmp_path: Path) -> None:
        search = make_run(tmp_path / "a", "search-1")
        trial = make_run(search / "trials", "search-1-0003")
        remember_run(search)
        assert find_run("search-1-0003", root=Path("runs")) == trial
        assert [run.path for run in read_index().runs] == [search]

    def test_index__more_than_its_maximum__keeps_the_last_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(index, "MAX_RUNS", 3)
        for number in range(5):
            remember_run(tmp_path / f"run-{number}")
        assert [run.path.name for run in read_index().runs] == ["run-4", "run-3", "run-2"]
        forget_runs([tmp_path / "run-3"])
        assert [run.path.name for run in read_index().runs] == ["run-4", "run-2"]

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "nonsense", '{"runs": [{"folder": 1}]}', "[" * 100_000, '{"runs": {"a": 1}}']
    )
    def test_index__damaged__is_said_and_written_again(self, tmp_path: Path, state: Path, text: str) -> None:
        state.mkdir()
        (state / "runs.json").write_text(text)
        assert read_index().problem
        assert "index of runs cannot be read" in forge("runs", "list", "--all")[1]
        remember_run(tmp_path / "run")
        assert [run.path.name for run in read_index().runs] == ["run"]

    def test_remember_run__state_folder_not_writable_or_locked__is_no_error(
        self, tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(index, "_PATIENCE_S", 0.02)
        state.mkdir()
        with (state / "runs.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            remember_run(tmp_path / "run")
        monkeypatch.setenv("FORGE_STATE", "/proc/nowhere")
        remember_run(tmp_path / "run")
        assert read_index().runs == ()

    def test_list__no_runs_here__says_where_it_looked_and_where_others_are(self, tmp_path: Path) -> None:
        remember_run(make_run(tmp_path / "elsewhere", "tiny-1"))
        _, text = forge("runs", "list")
        assert f"no runs in {tmp_path / 'here' / 'runs'}" in text
        assert "1 run is in other folders" in text
        assert "forge runs list --all" in text

    def test_list_all__names_folders_and_drops_what_has_vanished(self, tmp_path: Path) -> None:
        remember_run(make_run(tmp_path / "a", "tiny-1"))
        gone = make_run(tmp_path / "b", "tiny-2")
        remember_run(gone)
        shutil.rmtree(gone)
        _, text = forge("runs", "list", "--all")
        assert f"1 run is no longer there and will not be listed again: {gone}" in text
        assert str(tmp_path / "a") in text
        _, text = forge("runs", "list", "--all")
        assert "no longer there" not in text


class TestCompletion:
    def test_complete_run__offers_ids_here_and_elsewhere_that_a_shell_cannot_interpret(
        self, tmp_path: Path
    ) -> None:
        make_run(Path("runs"), "tiny-1")
        for name in ("tiny-2", "tiny-$(touch executed)", "tiny-\n3", "tiny 4"):
            remember_run(make_run(tmp_path / "elsewhere", name))

        class Context:
            params = {"runs": Path("runs")}  # noqa: RUF012

        assert complete_run(Context(), "tiny") == ["tiny-1", "tiny-2"]  # type: ignore[arg-type]
        assert complete_run(Context(), "l") == ["latest"]  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("shell", "variables"),
        [
            ("bash", {"COMP_WORDS": "forge runs show ti", "COMP_CWORD": "3"}),
            ("zsh", {"_TYPER_COMPLETE_ARGS": "forge runs show ti"}),
            ("fish", {"_TYPER_COMPLETE_ARGS": "forge runs show ti", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
        ],
    )
    def test_shell_completion__run_argument__prints_the_ids(
        self, monkeypatch: pytest.MonkeyPatch, shell: str, variables: dict[str, str]
    ) -> None:
        make_run(Path("runs"), "tiny-0101-1")
        done = CliRunner().invoke(
            app, [], prog_name="forge", env={"_FORGE_COMPLETE": f"complete_{shell}"} | variables
        )
        assert "tiny-0101-1" in done.output


class TestAnnotations:
    def test_tag_and_note__are_listed_shown_and_move_with_the_folder(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path / "a", "tiny-1")
        assert forge("runs", "tag", str(folder), "baseline", "lr=3e-4")[0] == 0
        assert forge("runs", "note", str(folder), "diverged at 300")[0] == 0
        moved = folder.rename(tmp_path / "moved")
        assert read_annotations(moved).tags == ("baseline", "lr=3e-4")
        assert "diverged at 300" in forge("runs", "show", str(moved))[1]
        listed = json.loads(forge("runs", "list", "--runs", str(tmp_path), "--tag", "baseline", "-o", "json")[1])
        assert [(run["tags"], run["note"]) for run in listed] == [(["baseline", "lr=3e-4"], "diverged at 300")]
        assert forge("runs", "tag", str(moved), "baseline", "--remove")[0] == 0
        assert read_annotations(moved).tags == ("lr=3e-4",)

    @pytest.mark.parametrize("tag", ["", "a b", "\x1b[31m", "-x", "x" * 65, "ä"])
    def test_change_tags__other_characters__raises(self, tmp_path: Path, tag: str) -> None:
        with pytest.raises(ArgumentError, match="is not a tag") as caught:
            change_tags(make_run(tmp_path), add=[tag])
        assert str(caught.value).isprintable()

    def test_annotations__of_a_hostile_folder__are_data(self, tmp_path: Path) -> None:
        folder, private = make_run(tmp_path), tmp_path / "private"
        private.write_text('{"tags": ["secret"], "note": ""}')
        (folder / ANNOTATIONS).symlink_to(private)
        assert read_annotations(folder).tags == ()
        set_note(folder, "mine")  # replaces the link, not what it leads to
        assert "secret" in private.read_text()
        for text in ('{"tags": "x"}', '{"tags": [1]}', "[]", '{"tags": [], "note": null}', "{" * 100_000):
            (folder / ANNOTATIONS).write_text(text)
            assert read_annotations(folder) == type(read_annotations(folder))()
        (folder / ANNOTATIONS).write_text(json.dumps({"tags": ["\x1b[2J", "ok"], "note": "\x1b[2J"}))
        assert read_annotations(folder).tags == ("ok",)
        assert "\x1b" not in forge("runs", "show", str(folder))[1]


class TestDelete:
    def test_delete__removes_the_folder_alone_and_what_links_lead_to_stays(self, tmp_path: Path) -> None:
        folder, outside = make_run(tmp_path / "runs"), tmp_path / "outside"
        outside.mkdir()
        (outside / "kept").touch()
        (folder / "checkpoints").symlink_to(outside)
        (folder / "evaluations").mkdir()
        for name in ("report.html", "evaluation.jsonl", ".evaluation.jsonl.lock"):
            (folder / name).touch()
        (folder / "logs" / "driver.log").symlink_to(outside / "kept")
        remember_run(folder)
        code, text = forge("runs", "delete", str(folder))
        assert (code, folder.exists()) == (2, True)
        assert "pass --yes" in text
        assert forge("runs", "delete", str(folder), "--yes")[0] == 0
        assert not folder.exists()
        assert (outside / "kept").exists()
        assert read_index().runs == ()

    def test_delete__link_to_a_run__raises(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(ArgumentError, match="is a link"):
            delete_run(tmp_path / "link")
        assert folder.exists()

    def test_delete__running__raises(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write("1234567")
            lock.flush()
            with pytest.raises(ArgumentError, match=r"is running|was started meanwhile"):
                delete_run(folder)
        assert (folder / "plan.json").exists()

    def test_delete__folder_with_other_files_or_no_run__raises(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        (folder / "thesis.tex").touch()
        with pytest.raises(ArgumentError, match=r"files that are not a run's: thesis\.tex"):
            delete_run(folder)
        (folder / "thesis.tex").unlink()
        (folder / "plan.json").rename(tmp_path / "plan.json")
        with pytest.raises(ArgumentError, match="holds no run"):
            delete_run(folder)
        (folder / "plan.json").symlink_to(tmp_path / "plan.json")
        with pytest.raises(ArgumentError, match="it is a link"):
            delete_run(folder)

    def test_delete__plan_that_cannot_be_read__is_deleted(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        (folder / "plan.json").write_text("nonsense")
        delete_run(folder)
        assert not folder.exists()

    def test_delete__trial__raises(self, tmp_path: Path) -> None:
        trial = make_run(make_run(tmp_path, "search-1") / "trials", "search-1-0001")
        with pytest.raises(ArgumentError, match="delete the whole search"):
            delete_run(trial)

    def test_summary_record__has_tags(self, tmp_path: Path) -> None:
        from forge.runs.reader import read_run

        folder = make_run(tmp_path)
        change_tags(folder, add=["a"])
        assert summary_record(read_run(folder))["tags"] == ["a"]
