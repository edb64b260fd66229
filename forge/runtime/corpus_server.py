"""Where the machines of a run get its corpus: from the head, which has it, piece by piece.

A run has one library, an actor on the head; it is made by the first agent that misses the corpus, and ends with
the run. What an agent has fetched stays in its machine's cache, so that the next run finds it there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ray

from forge.data.transfer import fetch_corpus, has_corpus, read_chunk
from forge.fs import default_cache_dir
from forge.plan.plan import plan_from_json, plan_to_json
from forge.runtime.recorder_actor import HEAD

CORPUS_SERVER = "library-"
"""How the names of libraries' actors begin."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4)
class CorpusServer:
    """The corpus of a run, on the machine that has it."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def read(self, name: str, offset: int) -> bytes:
        """A piece of one of its files. Raises: DataError if it has no such file."""
        return read_chunk(self._folder, name=name, offset=offset)


def ensure_corpus(plan_json: str, *, run_id: str, namespace: str) -> str:
    """The plan, with the folder that its corpus has on this machine, where it now is.

    Raises: DataError if it does not arrive, or cannot be kept; whatever Ray raises if the head is lost.
    """
    plan = plan_from_json(plan_json)
    home, digest = Path(plan.corpus.folder), plan.corpus.digest
    if has_corpus(home, digest=digest):
        return plan_json
    folder = default_cache_dir().absolute() / "data" / home.name
    if not has_corpus(folder, digest=digest):
        library = CorpusServer.options(  # type: ignore[attr-defined]
            name=f"{CORPUS_SERVER}{run_id}",
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            resources=HEAD,
        ).remote(str(home))
        fetch_corpus(
            folder, digest=digest, read=lambda name, offset: bytes(ray.get(library.read.remote(name, offset)))
        )
    return plan_to_json(replace(plan, corpus=replace(plan.corpus, folder=str(folder))))
