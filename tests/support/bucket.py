"""An S3 bucket on loopback, by moto's server, which can be made to fail for a while."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

NAME = "forge-tests"


@dataclass
class Bucket:
    """The bucket; `fails_until` is a time by which it will answer again."""

    endpoint: str
    fails_until: float = 0.0
    num_failures: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"s3://{NAME}/runs"

    def fail_for(self, seconds: float) -> None:
        """Answer 500 to everything from now on, for a while."""
        self.fails_until = time.monotonic() + seconds

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "planted-secret-of-a-bucket",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def serve_bucket() -> Iterator[Bucket]:
    """Serve an empty bucket from a thread; this process's environment leads to it meanwhile."""
    moto = DomainDispatcherApplication(create_backend_app)
    bucket = Bucket(endpoint="")

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        bucket.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if time.monotonic() < bucket.fails_until:
            bucket.num_failures += 1
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [
                b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
            ]
        return moto(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, answer, threaded=True)
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    os.environ.update(bucket.environment)
    try:
        boto3.client("s3").create_bucket(Bucket=NAME)
        yield bucket
    finally:
        server.shutdown()
        os.environ.clear()
        os.environ.update(before)
