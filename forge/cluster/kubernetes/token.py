"""Ray's token of a Kubernetes cluster, in two places: a file in the state folder, and the Secret that pods read."""

from __future__ import annotations

import base64
import binascii
import json
import os

from forge.cluster.base import make_token, token_path
from forge.cluster.kubernetes.kubectl import Kubectl
from forge.cluster.kubernetes.manifests import secret_name, token_secret
from forge.config.cluster import KubernetesSpec
from forge.errors import ClusterError


def share_token(kubectl: Kubectl, spec: KubernetesSpec) -> None:
    """Have the same token here and in the Secret; Ray was started with the one that is there.

    Raises: ClusterError if Kubernetes refuses, or the Secret holds something else.
    """
    answer = kubectl.ask("get", "secrets", secret_name(spec), "--ignore-not-found", "--output", "json").strip()
    if not answer:
        kubectl.apply(token_secret(spec, token=make_token(spec.name)))
        return
    try:
        token = base64.b64decode(json.loads(answer)["data"]["auth_token"], validate=True).decode().strip()
    except (KeyError, TypeError, ValueError, binascii.Error):
        token = ""
    if not token:
        raise ClusterError(
            f"the Secret {secret_name(spec)} holds no token of Ray's; take the cluster down and start it again: "
            f"forge cluster down {spec.name}"
        )
    path = token_path(spec.name)
    draft = path.with_suffix(".token.draft")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(token)
    draft.replace(path)
