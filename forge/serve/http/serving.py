"""The state of one server process, which all routes share."""

from __future__ import annotations

from fastapi import Request

from forge.serve.calls import ModelBackend
from forge.serve.http.admission import Admission
from forge.serve.http.api_keys import ApiKey, KeyRing
from forge.serve.http.connection import ConnectionLimit
from forge.serve.http.errors import ApiError
from forge.serve.http.generation import Generator
from forge.serve.http.rate_limit import RateLimiter
from forge.serve.http.settings import ServerSettings
from forge.serve.http.telemetry import Telemetry


class Serving:
    """Settings, model, keys, limits and metrics."""

    def __init__(
        self, *, settings: ServerSettings, backend: ModelBackend, keys: KeyRing, usd_per_hour: float | None = None
    ) -> None:
        self.settings, self.backend, self.keys = settings, backend, keys
        self.telemetry = Telemetry(usd_per_hour=usd_per_hour)
        self.admission = Admission(max_queue=settings.max_queue, telemetry=self.telemetry)
        self.connections = ConnectionLimit(
            most=settings.max_connections,
            most_per_client=settings.max_connections_per_client,
            telemetry=self.telemetry,
        )
        self.limiter = RateLimiter()
        self.generator = Generator(admission=self.admission, limiter=self.limiter, telemetry=self.telemetry)
        self._everyone = ApiKey(name="everyone", sha256="", limits=settings.limits)

    def key_of(self, request: Request) -> ApiKey:
        """Whose limits a request is counted to."""
        key: ApiKey | None = request.state.key
        return key or self._everyone

    def require_model(self, name: str, *, kinds: tuple[str, ...], what: str) -> None:
        """Raises: ApiError if a request names another model, or one that does not do this."""
        info = self.backend.info
        known = (info.name, *info.adapters)
        if name not in known:
            raise ApiError(
                f"the model {name[:120]!r} is not served here; served: {', '.join(known)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        if info.kind not in kinds:
            use = f"; its route is {_ROUTES[info.kind]}" if info.kind in _ROUTES else ""
            problem = f"{name} is a model of kind {info.kind}, which {what}{use}"
            raise ApiError(problem, code="wrong_kind", param="model")


_ROUTES = {
    **{"causal-lm": "/v1/chat/completions or /v1/completions", "embedding": "/v1/embeddings"},
    **dict.fromkeys(("classification", "token-classification", "reward"), "/v1/classify"),
    **{"seq2seq": "/v1/translate", "masked-lm": "/v1/fill-mask"},
}
"""By the kind of a model."""
