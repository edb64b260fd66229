"""The small files of a run folder, sent to workers on machines that do not see the folder.

Weights are not among them: such a run has its checkpoints in storage that all machines reach.
"""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

from forge.code_archive import ARCHIVE
from forge.errors import RunError
from forge.fs import default_cache_dir, make_private

SMALL_FILES = ("plan.json", "tokenizer", ARCHIVE)
"""What a run's model is loaded with besides its checkpoint."""


def pack_run(folder: Path) -> str | None:
    """Return a run's small files as a tar file in base64; None for a folder of weights."""
    if not (folder / "plan.json").is_file():
        return None
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in SMALL_FILES:
            if (folder / name).exists():
                archive.add(folder / name, arcname=name, filter=_without_owner)
    return base64.b64encode(content.getvalue()).decode()


def find_run_files(folder: Path, *, packed: str | None) -> Path:
    """Return a folder with a run's small files: the run's own, or one in this machine's cache, of the same name.

    Raises: RunError if they cannot be unpacked.
    """
    if packed is None or (folder / "plan.json").is_file():
        return folder
    content = base64.b64decode(packed)
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    copy = default_cache_dir().absolute() / "runs" / digest / folder.name
    try:
        make_private(copy)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(copy, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise RunError(f"cannot store the files of the run in {copy}: {error}") from error
    return copy


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member
