"""Names of forge's Ray actors, by which they find each other and are found again after a restart."""

from __future__ import annotations

NAMESPACE = "forge"
"""The Ray namespace of all of forge's actors."""
SUPERVISOR = "supervisor-"
"""`supervisor-RUN` is the supervisor of a training run; `supervisor-SEARCH.N` is a trial runner of a search."""
AGENT = "agent-"
"""`agent-RUN-NODE` hosts the agents of a run or a search on one node."""
CORPUS_SERVER = "corpus-server-"
RECORDER = "recorder-"
HEAD = {"node:__internal_head__": 0.001}
"""Resource request that places an actor on the head node, whose loss ends the cluster anyway."""
