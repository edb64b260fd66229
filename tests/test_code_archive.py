"""forge.code_archive: packing a folder, archives from elsewhere, the cache."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forge import code_archive
from forge.code_archive import (
    ARCHIVE,
    PackedCode,
    changed_files,
    code_folder,
    has_code,
    pack_code,
    read_archive,
    release_code,
    remove_unused_code,
    restore_code,
    unpack_code,
)
from forge.errors import UserCodeError

FILES = {"my_losses.py": "class Ranking: ...\n", "lib/table.csv": "1,2\n", "lib/__init__.py": ""}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_files(tmp_path / "src", FILES)


def write_files(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return output.getvalue()


def test_pack_code__equal_files_elsewhere__same_digest_and_bytes(src: Path, tmp_path: Path) -> None:
    other = write_files(tmp_path / "other", dict(reversed(FILES.items())))
    os.utime(other / "my_losses.py", (1, 1))
    (other / "my_losses.py").chmod(0o755)
    assert pack_code(src).digest == pack_code(other).digest
    assert pack_code(src).to_tar() == pack_code(other).to_tar()
    assert list(pack_code(src).files) == sorted(FILES)


@pytest.mark.parametrize(("name", "text"), [("my_losses.py", "class Ranking: pass\n"), ("new.py", "")])
def test_pack_code__changed_or_new_file__other_digest(src: Path, name: str, text: str) -> None:
    before = pack_code(src)
    (src / name).write_text(text)
    after = pack_code(src)
    assert after.digest != before.digest
    assert changed_files(before, after) == [name]


def test_pack_code__hidden_files_and_byte_code__are_left_out(src: Path) -> None:
    before = pack_code(src).digest
    write_files(src, {".env": "KEY=1", ".git/config": "x", "__pycache__/a.pyc": "x", "lib/old.pyc": "x"})
    assert pack_code(src).digest == before


def test_pack_code__link_inside_the_folder__packs_its_content(src: Path) -> None:
    (src / "alias.py").symlink_to("my_losses.py")
    assert pack_code(src).files["alias.py"] == b"class Ranking: ...\n"


def test_pack_code__link_out_of_the_folder__is_refused(src: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (src / "lib" / "data.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserCodeError, match=r"lib/data\.txt is a link that leads out of the folder"):
        pack_code(src)


def test_pack_code__link_to_a_folder__is_refused(src: Path) -> None:
    (src / "again").symlink_to(src)
    with pytest.raises(UserCodeError, match="again is a link"):
        pack_code(src)


def test_pack_code__broken_link_and_pipe__are_refused(src: Path) -> None:
    (src / "gone.py").symlink_to("nothing.py")
    with pytest.raises(UserCodeError, match=r"gone\.py is a link to no file"):
        pack_code(src)
    (src / "gone.py").unlink()
    os.mkfifo(src / "pipe")
    with pytest.raises(UserCodeError, match="pipe is neither a file nor a folder"):
        pack_code(src)


def test_pack_code__too_large__names_the_largest_files(src: Path) -> None:
    with (src / "lib" / "weights.bin").open("wb") as file:
        file.truncate(code_archive.MAX_CODE_BYTES + 1)
    with pytest.raises(UserCodeError, match=r"more than the .* largest: lib/weights\.bin \("):
        pack_code(src)


def test_pack_code__too_many_files__names_the_fullest_folder(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_archive, "MAX_CODE_FILES", 4)
    write_files(src, {f"results/{number}.txt": "" for number in range(3)})
    with pytest.raises(UserCodeError, match=r"6 files, more than 4; most are in: results \(3 files\)"):
        pack_code(src)


@pytest.mark.parametrize(("name", "problem"), [("none", "does not exist"), ("src/my_losses.py", "not a folder")])
def test_pack_code__no_folder__is_refused(src: Path, name: str, problem: str) -> None:
    with pytest.raises(UserCodeError, match=problem):
        pack_code(src.parent / name)


def test_pack_code__no_python_file__is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="has no Python file"):
        pack_code(write_files(tmp_path / "empty", {"readme.txt": "x"}))


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "a//b.py", "./a.py", "a\\b.py"])
def test_read_archive__name_that_leads_elsewhere__is_refused(name: str, cache: Path) -> None:
    with pytest.raises(UserCodeError, match="entry that forge never writes"):
        read_archive(tar_of((tarfile.TarInfo(name), b"x")), digest="0" * 32)
    assert not cache.exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_read_archive__anything_but_a_file__is_refused(kind: bytes) -> None:
    member = tarfile.TarInfo("a.py")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserCodeError, match="entry that forge never writes"):
        read_archive(tar_of((member, b"")), digest="0" * 32)


def test_read_archive__name_given_twice__is_refused() -> None:
    twice = tar_of((tarfile.TarInfo("a.py"), b"1"), (tarfile.TarInfo("a.py"), b"2"))
    with pytest.raises(UserCodeError, match="entry that forge never writes"):
        read_archive(twice, digest="0" * 32)


def test_read_archive__changed_content__is_refused(src: Path) -> None:
    code = pack_code(src)
    changed = PackedCode(files={**code.files, "my_losses.py": b"import os\n"})
    with pytest.raises(UserCodeError, match=f"the plan says {code.digest}"):
        read_archive(changed.to_tar(), digest=code.digest)


@pytest.mark.parametrize("archive", [b"", b"no archive", b"\x1f\x8b" + bytes(600)])
def test_read_archive__no_archive__is_refused(archive: bytes) -> None:
    with pytest.raises(UserCodeError):
        read_archive(archive, digest="0" * 32)


def test_unpack_code__round_trip__equal_files_that_only_the_owner_reads(src: Path) -> None:
    code = read_archive(pack_code(src).to_tar(), digest=pack_code(src).digest)
    folder = unpack_code(code)
    assert folder == code_folder(code.digest)
    assert pack_code(folder) == code
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent, folder / "lib")} == {0o700}
    assert [path.name for path in folder.parent.iterdir()] == [code.digest]


def test_unpack_code__damaged_cache__is_replaced(src: Path) -> None:
    code = pack_code(src)
    folder = unpack_code(code)
    (folder / "my_losses.py").write_text("import os\n")
    assert not has_code(code.digest)
    unpack_code(code)
    assert has_code(code.digest)
    assert [path.name for path in folder.parent.iterdir()] == [code.digest]


def test_unpack_code__many_at_once__all_succeed(src: Path) -> None:
    code = pack_code(src)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: unpack_code(code), range(16)))
    assert set(folders) == {code_folder(code.digest)}
    assert has_code(code.digest)


def test_unpack_code__unwritable_cache__is_one_message(src: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(UserCodeError, match="FORGE_CACHE"):
        unpack_code(pack_code(src))


def test_has_code__folder_that_others_can_write__is_refused(src: Path) -> None:
    code = pack_code(src)
    unpack_code(code).chmod(0o777)
    with pytest.raises(UserCodeError, match="can be written by another user"):
        has_code(code.digest)


@pytest.mark.parametrize("name", ["__pycache__/my_losses.cpython-311.pyc", "my_losses.pyc", ".hidden"])
def test_has_code__extra_file__is_not_the_code(src: Path, name: str) -> None:
    code = pack_code(src)
    write_files(unpack_code(code), {name: "x"})
    assert not has_code(code.digest)
    unpack_code(code)
    assert has_code(code.digest)


@pytest.mark.parametrize("name", [".env", "a/.git/config", "__pycache__/a.py", "a.pyc"])
def test_read_archive__name_that_is_never_packed__is_refused(name: str) -> None:
    with pytest.raises(UserCodeError, match="entry that forge never writes"):
        read_archive(tar_of((tarfile.TarInfo(name), b"x")), digest="0" * 32)


@pytest.mark.parametrize("headers", [{}, {"GNU.sparse.size": "600000000", "GNU.sparse.map": "0,1"}])
def test_read_archive__size_far_beyond_the_archive__is_refused_unread(headers: dict[str, str]) -> None:
    member = tarfile.TarInfo("a.py")
    member.size, member.pax_headers = (1 if headers else 600_000_000), headers
    archive = member.tobuf(tarfile.PAX_FORMAT) + b"x".ljust(512, b"\0") + bytes(1024)
    with pytest.raises(UserCodeError, match="entry that forge never writes"):
        read_archive(archive, digest="0" * 32)


def test_pack_code__link_to_itself__is_refused(src: Path) -> None:
    (src / "loop.py").symlink_to("loop.py")
    with pytest.raises(UserCodeError, match=r"loop\.py is a link that leads to itself"):
        pack_code(src)


def test_has_code__link_in_place_of_the_folder__is_refused(src: Path) -> None:
    code = pack_code(src)
    code_folder(code.digest).parent.mkdir(parents=True)
    code_folder(code.digest).symlink_to(src)
    with pytest.raises(UserCodeError, match="can be written by another user"):
        has_code(code.digest)


@pytest.mark.parametrize("digest", ["", "../../etc", "A" * 32, "0" * 31, "0" * 32 + "\n"])
def test_code_folder__no_digest__is_refused(digest: str) -> None:
    with pytest.raises(UserCodeError, match="not the digest"):
        code_folder(digest)


def test_restore_code__empty_cache__unpacks_the_run_folders_archive(src: Path, tmp_path: Path) -> None:
    code = pack_code(src)
    with pytest.raises(UserCodeError, match="neither in the cache nor in"):
        restore_code(code.digest, run_folder=tmp_path)
    (tmp_path / ARCHIVE).write_bytes(code.to_tar())
    assert restore_code(code.digest, run_folder=tmp_path) == code_folder(code.digest)
    assert has_code(code.digest)
    (tmp_path / ARCHIVE).unlink()
    assert restore_code(code.digest, run_folder=tmp_path) == code_folder(code.digest)


def unpacked(name: str, *, unused_days: float = 0) -> PackedCode:
    """Code in the cache that was last used so long ago."""
    code = PackedCode(files={f"{name}.py": b"x = 1\n"})
    age(unpack_code(code), days=unused_days)
    return code


def age(folder: Path, *, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(folder, (then, then))


def test_unpack_code__others_unused_for_long__are_removed_and_logged(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, recent = unpacked("old"), unpacked("recent", unused_days=29)
    (cache / "code" / "notes").mkdir()
    age(cache / "code" / "notes", days=99)
    age(code_folder(old.digest), days=31)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    new = unpacked("new")
    assert {path.name for path in (cache / "code").iterdir()} == {recent.digest, new.digest, "notes"}
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"removed the unpacked code of 1 job from {cache / 'code'}, unused for 30 days: {old.digest[:8]}"


def test_has_code__old_code__is_used_again_and_kept() -> None:
    code = unpacked("old", unused_days=31)
    assert has_code(code.digest)
    assert remove_unused_code() == []
    assert has_code(code.digest)


def test_remove_unused_code__cache_without_code__does_nothing() -> None:
    assert remove_unused_code() == []


def test_restore_code__held_by_this_process__is_kept(tmp_path: Path) -> None:
    code = unpacked("old")
    age(restore_code(code.digest, run_folder=tmp_path), days=31)
    assert remove_unused_code() == []
    release_code(code.digest)
    assert remove_unused_code() == [code.digest]
    assert not has_code(code.digest)


def test_use_code__in_another_process__is_kept_until_its_forked_child_ends() -> None:
    code = unpacked("old")
    script = (
        "import os, sys\n"
        "from forge.user_code import use_code\n"
        f"use_code({code.digest!r})\n"
        "if os.fork() == 0:\n"
        "    print('used', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"
        process.wait()
        age(code_folder(code.digest), days=31)
        assert remove_unused_code() == []
        process.stdin.close()
        process.stdout.read()  # until the child has ended
    deadline = time.monotonic() + 10
    while not (removed := remove_unused_code()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert removed == [code.digest]


def test_remove_unused_code__while_others_use_old_code__never_takes_it_from_them() -> None:
    code = unpacked("old")
    is_over = threading.Event()
    removed: list[str] = []

    def remove() -> None:
        while not is_over.is_set():
            removed.extend(remove_unused_code())

    removers = [threading.Thread(target=remove) for _ in range(2)]
    for remover in removers:
        remover.start()
    try:
        deadline, num_uses = time.monotonic() + 60, 0
        while (num_uses < 100 or len(removed) < 3) and time.monotonic() < deadline:
            folder = unpack_code(code)
            assert pack_code(folder) == code
            age(folder, days=31)  # from here on it may be removed
            num_uses += 1
    finally:
        is_over.set()
        for remover in removers:
            remover.join()
    assert len(removed) >= 3


def test_has_code__being_removed__waits_and_finds_nothing() -> None:
    code = unpacked("old", unused_days=31)
    folder = code_folder(code.digest)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as a process that has found it unused
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(has_code, code.digest)
        time.sleep(0.2)
        assert not answer.done()
        folder.rename(folder.with_name(".removed"))
        os.close(handle)
        assert answer.result() is False


def test_remove_unused_code__while_it_is_verified__keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = unpacked("old")
    found: list[list[str]] = []

    def remove_meanwhile(folder: Path) -> PackedCode:
        age(folder, days=31)
        found.append(remove_unused_code())
        return pack_code(folder)

    monkeypatch.setattr(code_archive, "pack_code", remove_meanwhile)
    assert has_code(code.digest)
    assert found == [[]]
