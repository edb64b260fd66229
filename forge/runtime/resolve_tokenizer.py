"""Check the tokenizer of a job: against its pretrained weights, and against what its objective needs."""

from __future__ import annotations

from forge.config.checkpoint_path import tokenizer_of
from forge.config.load import LoadedJob
from forge.data.tokenizer import load_tokenizer
from forge.data.tokenizer_files import ROLES, special_names, special_roles, vocabulary_problem
from forge.errors import DataError
from forge.objective.registry import OBJECTIVES
from forge.runtime.resolve_init import missing_weights


def check_tokenizer(loaded: LoadedJob) -> tuple[str, ...]:
    """Check that pretrained weights are trained with the token ids of their own tokenizer.

    Returns: what the plan says about it.
    Raises: JobFileError if the folder has no tokenizer and none is given, or the given one has other ids;
        DataError if the given one cannot be used.
    """
    job = loaded.job
    given = job.data.tokenizer.from_pretrained
    if job.model.from_pretrained is None or given is None:
        return ()
    source = tokenizer_of(job.model.from_pretrained)
    try:
        own = load_tokenizer(source)
    except DataError as error:
        if given != source:
            return (
                f"the tokenizer {given} is not compared with that of {source}, which has none that forge reads",
            )
        problem = str(error).removeprefix("data.tokenizer.from_pretrained: ")
        unusable = (
            f"no tokenizer is given in data.tokenizer, and that of the pretrained model cannot be used: {problem}"
        )
        raise loaded.source.error(
            "model.from_pretrained",
            missing_weights(job.model.from_pretrained) or unusable,
            show_value=False,
        ) from error
    difference = vocabulary_problem(own.content, given=load_tokenizer(given).content) if given != source else None
    if difference is not None:
        raise loaded.source.error(
            "data.tokenizer.from_pretrained",
            f"{difference}, so the embeddings would be those of other tokens; leave data.tokenizer out",
        )
    return ()


def require_special_tokens(loaded: LoadedJob) -> None:
    """Raises: JobFileError if a loaded tokenizer lacks a token that the objective needs."""
    objective, source = OBJECTIVES.get(loaded.job.training.objective), loaded.job.data.tokenizer.from_pretrained
    if objective is None or source is None or not objective.needs_special_tokens:
        return
    tokenizer = load_tokenizer(source)
    found = special_roles(content=tokenizer.content, config=tokenizer.config, files=tokenizer.files)
    roles = [role for role, token in ROLES.items() if token in objective.special_tokens]
    missing = [role for role in roles if role not in found]
    added = special_names(tokenizer.content)
    missing += [token for token in objective.special_tokens if token not in (*ROLES.values(), *added)][:1]
    if missing:
        key = "data.tokenizer.from_pretrained"
        if key not in loaded.source.locations:
            key = "model.from_pretrained"
        raise loaded.source.error(
            key,
            f"its tokenizer has no {' and no '.join(missing)} in tokenizer_config.json and tokenizer.json, which "
            f"training.objective: {loaded.job.training.objective} needs",
        )
