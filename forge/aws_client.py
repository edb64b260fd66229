"""Clients for AWS by boto3, which only this module imports, and its errors as one sentence that says what to do."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

from forge.errors import ClusterError

ANY_REGION = "us-east-1"
"""The region for requests about the account; every account has it."""
_session_lock = threading.Lock()


def client(service: str, region: str) -> Any:
    """A boto3 client, created once. Raises: ClusterError if boto3 is not installed."""
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client(service, region, environment)


@functools.lru_cache(maxsize=128)
def _client(service: str, region: str, environment: tuple[tuple[str, str], ...]) -> Any:
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 4})
    with _session_lock:  # unlike clients, a session is not thread-safe
        return _session(environment).client(service, region_name=region, config=config)


@functools.lru_cache(maxsize=4)
def _session(environment: tuple[tuple[str, str], ...]) -> Any:
    """Return the session of all clients; parsing its service definitions takes longer than a request."""
    try:
        import boto3
    except ImportError:
        raise ClusterError("AWS needs boto3: pip install 'forge-train[aws]'") from None
    return boto3.session.Session()


@contextlib.contextmanager
def aws_errors(region: str) -> Iterator[None]:
    """Turn errors of boto3 into ClusterError with one sentence that says what to do."""
    try:
        import botocore.exceptions as wrong
    except ImportError:
        raise ClusterError("AWS needs boto3: pip install 'forge-train[aws]'") from None
    fix = "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    try:
        yield
    except (wrong.NoCredentialsError, wrong.PartialCredentialsError, wrong.ProfileNotFound) as error:
        raise ClusterError(f"no AWS credentials were found: {error}; {fix}") from None
    except wrong.ClientError as error:
        code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
        if code in _REFUSED:
            raise ClusterError(f"AWS does not accept the credentials in {region}: {code}; {fix}") from None
        if code in ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException"):
            raise ClusterError(
                f"these credentials do not allow {error.operation_name} in {region}: {message}; "
                "docs/operations.md lists the rights that forge needs"
            ) from None
        raise ClusterError(f"AWS refuses {error.operation_name} in {region}: {code}: {message}") from None
    except (wrong.BotoCoreError, wrong.HTTPClientError) as error:
        raise ClusterError(f"AWS's service in {region} cannot be reached: {error}") from None


_REFUSED = {
    *("AuthFailure", "InvalidClientTokenId", "SignatureDoesNotMatch", "UnrecognizedClientException"),
    *("ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidAccessKeyId", "OptInRequired"),
}


@contextlib.contextmanager
def ignore_codes(*codes: str) -> Iterator[None]:
    """Ignore AWS errors with these codes: the request was redundant."""
    import botocore.exceptions

    try:
        yield
    except botocore.exceptions.ClientError as error:
        if error.response["Error"]["Code"] not in codes:
            raise
