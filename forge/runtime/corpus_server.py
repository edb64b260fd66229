"""The corpus server: an actor on the head node from which the other nodes of a run download the prepared corpus.

The first agent that lacks the corpus starts the server; it ends with the run. Downloaded files stay in the node's
cache, where the next run finds them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from forge.data.transfer import fetch_corpus, has_corpus, read_chunk
from forge.fs import default_cache_dir
from forge.plan.plan import plan_from_json, plan_to_json
from forge.runtime.actor_names import CORPUS_SERVER, HEAD, NAMESPACE


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4)
class CorpusServer:
    """Serves the files of a prepared corpus, chunk by chunk."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def read(self, name: str, offset: int) -> bytes:
        """A chunk of one file. Raises: DataError if the corpus has no such file."""
        return read_chunk(self._folder, name=name, offset=offset)


def ensure_corpus(plan_json: str, *, run_id: str) -> str:
    """Download the plan's corpus unless this node has it. Returns: the plan with the corpus folder of this node.

    Raises: DataError if the corpus is incomplete or cannot be stored; Ray's errors if the head is lost.
    """
    plan = plan_from_json(plan_json)
    home, digest = Path(plan.corpus.folder), plan.corpus.digest
    if has_corpus(home, digest=digest):
        return plan_json
    folder = default_cache_dir().absolute() / "data" / home.name
    if not has_corpus(folder, digest=digest):
        server: Any = CorpusServer.options(  # type: ignore[attr-defined]
            name=f"{CORPUS_SERVER}{run_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            resources=HEAD,
        ).remote(str(home))
        fetch_corpus(
            folder, digest=digest, read=lambda name, offset: bytes(ray.get(server.read.remote(name, offset)))
        )
    return plan_to_json(replace(plan, corpus=replace(plan.corpus, folder=str(folder))))
