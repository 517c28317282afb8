"""HTTP: the page, what is installed and how the service fares, prepared frames, posted speech, and the door to the
WebSocket. Errors are JSON with the status that belongs to them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from ..call import Stages
from ..errors import LipsyncError, Status, Stopping
from ..health import Health
from ..manifest import SCANS, tenant_names
from ..metrics import Metrics
from ..pipeline import Compositor
from ..sessions.live import Live
from ..tenant import Tenant
from .admission import Admission
from .faults import error_fields, http_code
from .ledger import CANCELLED, OK, REQUEST_ID, Ledger
from .stats import describe
from .uploads import Uploads
from .websocket import Conversations

log = logging.getLogger(__name__)

PAGE: Final = Path(__file__).parents[1] / "web"
SECURITY: Final = (
    (
        b"content-security-policy",
        b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"microphone=(self), camera=(), geolocation=()"),
)
GONE: Final = 499
"""The client left before there was an answer: nginx's code, which nobody reads."""
_FOREVER = "public, max-age=31536000, immutable"
_ASK_AGAIN = "no-cache"
_STATUSES = {404: Status.NOT_FOUND, 405: Status.UNIMPLEMENTED}
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Site:
    """Everything under the HTTP port; `app` is the ASGI application."""

    def __init__(
        self,
        compositor: Compositor,
        live: Live,
        metrics: Metrics,
        health: Health,
        admission: Admission,
        ledger: Ledger,
        page: Path = PAGE,
    ) -> None:
        origins = compositor.settings.http.allowed_origins
        self.conversations = Conversations(live, ledger, origins)
        self._compositor, self._live, self._metrics, self._health = compositor, live, metrics, health
        uploads = Uploads(compositor, admission)
        self.app = Starlette(
            routes=[
                Route("/healthz", self._alive),
                Route("/readyz", self._ready),
                Route("/metrics", self._expose),
                Route("/stats", self._stats),
                Route("/v1/tenants", self._tenants),
                Mount(
                    "/v1/tenants",
                    routes=[
                        Route("/{tenant}", self._tenant),
                        Route("/{tenant}/frames/{number}.jpg", self._frame),
                        Route("/{tenant}/speak", uploads.speak, methods=["POST"]),
                    ],
                ),
                WebSocketRoute("/ws/{tenant}", self.conversations.serve),
                Mount("/", _Page(directory=page, html=True)),
            ],
            middleware=[Middleware(_Secured), Middleware(_Entered, ledger=ledger), *_sharing(origins)],
            exception_handlers={
                LipsyncError: _answer_fault,
                HTTPException: _answer_http,
                ClientDisconnect: _answer_nobody,
                Exception: _answer_unforeseen,
            },
        )

    async def _alive(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _ready(self, request: Request) -> Response:
        if self._health.fault is not None:
            raise self._health.fault.with_traceback(None)
        return PlainTextResponse("ready\n")

    async def _expose(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), media_type=_METRICS_TYPE)

    async def _stats(self, request: Request) -> Response:
        held = describe(self._compositor.fleet.report(), self._metrics)
        own = {"process": os.getpid(), "workers": self._compositor.settings.server.workers}
        return JSONResponse({**own, **self._live.stats(), **held}, headers={"Cache-Control": "no-store"})

    async def _tenants(self, request: Request) -> Response:
        names = await asyncio.to_thread(tenant_names, self._compositor.settings.model_repository)
        return JSONResponse({"tenants": [{"id": name} for name in names]}, headers={"Cache-Control": _ASK_AGAIN})

    async def _tenant(self, request: Request) -> Response:
        tenant = await self._open(request)
        manifest, version = tenant.manifest, _version(tenant)
        return JSONResponse(
            {
                "id": tenant.name,
                "frames": manifest.frames,
                "width": manifest.width,
                "height": manifest.height,
                "fps": manifest.fps,
                "quality": manifest.quality,
                "version": version,
                "frame_url": f"/v1/tenants/{tenant.name}/frames/{{number}}.jpg?v={version}",
            },
            headers={"Cache-Control": _ASK_AGAIN},
        )

    async def _frame(self, request: Request) -> Response:
        """A prepared frame. Cached for good under ?v=, the tenant's version; else asked after, by ETag."""
        tenant, digits = await self._open(request), request.path_params["number"]
        # Not Starlette's own conversion: Python refuses to read thousands of digits.
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 9 and int(digits) < tenant.frames):
            raise HTTPException(404, f"frame {digits[:20]}: {tenant.name!r} has frames 0 to {tenant.frames - 1}")
        number = int(digits)
        version = _version(tenant)
        lasting = request.query_params.get("v") == version
        headers = {"ETag": f'"{version}-{number}"', "Cache-Control": _FOREVER if lasting else _ASK_AGAIN}
        if headers["ETag"] in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        # Its pages may have to come from the disk.
        data = await asyncio.to_thread(tenant.frame(number).jpeg)
        return Response(data, media_type="image/jpeg", headers=headers)

    async def _open(self, request: Request) -> Tenant:
        return await self._compositor.open(request.path_params["tenant"], Stages())


def _sharing(origins: Sequence[str]) -> list[Middleware]:
    """What tells browsers whose pages may read answers; without it, the service's own."""
    told = ("ETag", "Retry-After", REQUEST_ID)
    methods, asked = ("GET", "HEAD", "POST"), (REQUEST_ID,)
    shared = Middleware(CORSMiddleware, origins, methods, asked, expose_headers=told)
    return [shared] if origins else []


def _version(tenant: Tenant) -> str:
    """Changes with the prepared frames."""
    manifest = tenant.manifest
    return hashlib.sha256(f"{manifest.header} {manifest.files[SCANS].sha256}".encode()).hexdigest()[:16]


class _Page(StaticFiles):
    """The page's files, asked after at each use: a new release replaces them under the same names."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            refusal = PlainTextResponse("no WebSocket here: use /ws/{tenant}\n", 404)
            await WebSocket(scope, receive, send).send_denial_response(refusal)
        else:
            await super().__call__(scope, receive, send)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.setdefault("Cache-Control", _ASK_AGAIN)
        return response


class _Entered:
    """Gives each request its entry in the ledger, as `request.state.entry`, and its answer the request's id. Whose
    request is cut off is told so, unless the answer has begun."""

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        self._app, self._ledger = app, ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        told = path.startswith("/v1/") and "/frames/" not in path  # the others are asked for again and again
        begun = whole = False

        async def answer(message: Message) -> None:
            nonlocal begun, whole
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), (REQUEST_ID.encode(), entry.request.encode())]
                if entry.status == OK:
                    entry.status = _status_of(message["status"])
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        with self._ledger.entry("HTTP", headers, told=told) as entry:
            scope.setdefault("state", {})["entry"] = entry
            try:
                await self._app(scope, receive, answer)
            except asyncio.CancelledError:
                # Nobody else cuts off requests.
                stopping = Stopping("the service stops", retry_after_s=1)
                entry.fail(stopping)
                if not begun:
                    await _told(stopping)(scope, receive, answer)
                raise
            finally:
                entry.rename(_method_of(scope))
            if not whole and entry.status == OK:
                entry.status = CANCELLED


def _method_of(scope: Scope) -> str:
    """What was asked for, in a word of ours: once it has been found."""
    name = getattr(scope.get("endpoint"), "__name__", "page")
    return f"HTTP {name.removeprefix('_')}"


def _status_of(code: int) -> str:
    if code < 400:
        return OK
    if code == GONE:
        return CANCELLED
    status = _STATUSES.get(code, Status.INVALID_ARGUMENT if code < 500 else Status.INTERNAL)
    return status.value


class _Secured:
    """Puts the security headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                message["headers"] = [*message.get("headers", []), *SECURITY]
            await send(message)

        await self._app(scope, receive, secured)


def _json(code: int, fields: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": fields}, code, {"Cache-Control": "no-store", **(headers or {})})


async def _answer_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, LipsyncError)
    request.state.entry.fail(error)
    return _told(error)


def _told(error: LipsyncError) -> Response:
    # Whole seconds, RFC 9110 10.2.3.
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return _json(http_code(error), error_fields(error), headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    """What HTTP itself refuses: no such path, a method that is not allowed, a body that is too large."""
    assert isinstance(error, HTTPException)
    status = _STATUSES.get(error.status_code, Status.INVALID_ARGUMENT).value
    reason = f"HTTP_{error.status_code}"
    fields = {"status": status, "reason": reason, "message": error.detail, "field": "", "retry_after_s": None}
    return _json(error.status_code, fields, dict(error.headers or {}))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _answer_unforeseen(request: Request, error: Exception) -> Response:
    # uvicorn closes the connection.
    fields = error_fields(LipsyncError("internal error; the service's log has the details"))
    return _json(500, fields, {"Connection": "close", REQUEST_ID: request.state.entry.request})
