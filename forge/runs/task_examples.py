"""The file with the examples of a job's tasks: in the cache and in the run folder, named by a digest of its bytes.

The plan has the digest. The client writes the file when a run is started, submission sends it to the head, and
nodes download it as they do the code of the job; `forge.evaluate.stored_examples` says what is in it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from forge.errors import DataError
from forge.fs import default_cache_dir, make_private, write_atomic

TASK_EXAMPLES = "task-examples.jsonl"
"""Name in the run folder."""
_DIGEST = re.compile("[0-9a-f]{32}")


def digest_of(content: bytes) -> str:
    """BLAKE2b of 16 bytes, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def cache_examples(content: bytes) -> str:
    """Write the file into the cache. Returns: its digest. Raises: DataError if the cache cannot be written."""
    digest = digest_of(content)
    path = _cached(digest)
    try:
        make_private(path.parent)
        write_atomic(path, content, mode=0o600)
    except OSError as error:
        raise DataError(f"cannot store the examples of evaluate.tasks in {path}: {error.strerror}") from error
    return digest


def has_examples(digest: str) -> bool:
    """Return whether the cache has the file, unchanged."""
    return _content(_cached(digest), digest=digest) is not None


def examples_content(digest: str, *, run_folder: Path | None = None) -> bytes:
    """Return the file's bytes, from the cache or from the run folder.

    Raises: DataError if neither has it, or its bytes have another digest.
    """
    places = [_cached(digest), *([run_folder / TASK_EXAMPLES] if run_folder is not None else [])]
    for place in places:
        found = _content(place, digest=digest)
        if found is not None:
            return found
    raise DataError(
        f"the examples of evaluate.tasks are missing or were changed in {' and '.join(map(str, places))}: "
        "resume the run from its job file, which reads them again"
    )


def _content(path: Path, *, digest: str) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if digest_of(content) == digest else None


def _cached(digest: str) -> Path:
    if _DIGEST.fullmatch(digest) is None:
        raise DataError(f"the plan has no digest of the examples of its tasks, but {digest!r}")
    return default_cache_dir().absolute() / "tasks" / f"{digest}.jsonl"
