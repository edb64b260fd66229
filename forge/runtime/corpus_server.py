"""The corpus server: an actor on the head node from which the other nodes of a run download the prepared corpus and
the packed code of the job, and the examples of its tasks.

The first agent that lacks one of them starts the server; it ends with the run. Downloaded files stay in the node's
cache, where the next run finds them.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from forge.code_archive import has_code, read_archive, read_run_code, unpack_code
from forge.data.transfer import fetch_corpus, has_corpus, read_chunk
from forge.fs import default_cache_dir
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.runs.task_examples import cache_examples, examples_content, has_examples
from forge.runtime.actor_names import CORPUS_SERVER, HEAD, NAMESPACE


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=4)
class CorpusServer:
    """Serves the files of a prepared corpus, chunk by chunk, and the code archive of the run folder."""

    def __init__(self, folder: str, run_folder: str) -> None:
        self._folder, self._run_folder = Path(folder), Path(run_folder)

    def read(self, name: str, offset: int) -> bytes:
        """A chunk of one file. Raises: DataError if the corpus has no such file."""
        return read_chunk(self._folder, name=name, offset=offset)

    def read_code(self, digest: str) -> bytes:
        """The code archive. Raises: UserCodeError if the run folder has none with this digest."""
        return read_run_code(digest, run_folder=self._run_folder).to_tar()

    def read_task_examples(self, digest: str) -> bytes:
        """The examples of the job's tasks. Raises: DataError if the head has none with this digest."""
        return examples_content(digest, run_folder=self._run_folder)


def ensure_inputs(plan_json: str, *, run_folder: Path) -> str:
    """Download the corpus and the code of a plan unless this node has them.

    Args:
        run_folder: on the head: that of the run, or of the search a trial belongs to.

    Returns: the plan with the corpus folder of this node.
    Raises: DataError, UserCodeError if something is incomplete or cannot be stored; Ray's errors if the head is
        lost.
    """
    plan = plan_from_json(plan_json)
    if plan.code is not None and not has_code(plan.code.digest):
        archive = bytes(ray.get(_server(plan, run_folder=run_folder).read_code.remote(plan.code.digest)))
        unpack_code(read_archive(archive, digest=plan.code.digest))
    if plan.task_examples is not None and not has_examples(plan.task_examples):
        cache_examples(
            bytes(ray.get(_server(plan, run_folder=run_folder).read_task_examples.remote(plan.task_examples)))
        )
    home, digest = Path(plan.corpus.folder), plan.corpus.digest
    if has_corpus(home, digest=digest):
        return plan_json
    folder = default_cache_dir().absolute() / "data" / home.name
    if not has_corpus(folder, digest=digest):
        server = _server(plan, run_folder=run_folder)
        fetch_corpus(
            folder, digest=digest, read=lambda name, offset: bytes(ray.get(server.read.remote(name, offset)))
        )
    return plan_to_json(replace(plan, corpus=replace(plan.corpus, folder=str(folder))))


def end_corpus_server(run_id: str) -> None:
    """End the corpus server of a run or a search, if there is one."""
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        ray.kill(ray.get_actor(f"{CORPUS_SERVER}{run_id}", namespace=NAMESPACE))


def _server(plan: Plan, *, run_folder: Path) -> Any:
    return CorpusServer.options(  # type: ignore[attr-defined]
        name=f"{CORPUS_SERVER}{run_folder.name}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        resources=HEAD,
    ).remote(plan.corpus.folder, str(run_folder))
