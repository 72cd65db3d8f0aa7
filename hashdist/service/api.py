"""The routes of the search service. Plain FastAPI: what answers them is handed in, so it runs with and without Ray."""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from hashdist.ground import telemetry
from hashdist.ground.errors import HashdistError, InvalidInput
from hashdist.ground.settings import ServiceSettings
from hashdist.ground.version import __version__
from hashdist.service import limits
from hashdist.service.batching import Answer, Batches
from hashdist.service.limits import Border, Bucket, Busy
from hashdist.service.serving import Served, Serving, age_s
from hashdist.service.thumbnails import SIDES, Thumbnails, code_of

_FIELDS = 16
_WAIT_S = 2.0
"""Seconds that a picture, or an older version, waits for its turn before the answer is 429."""

_OPENED_AT_ONCE = 2

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = {
    "": ("index.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}
_KINDS = {
    400: "InvalidInput",
    401: "Unauthorized",
    404: "NotFound",
    405: "MethodNotAllowed",
    415: "UnsupportedMediaType",
}


class EncodedImage(NamedTuple):
    """A picture's code uint8 [L/8], and the width and height it was decoded to."""

    code: NDArray[np.uint8]
    width: int
    height: int


Encode = Callable[[str, bytes], Awaitable[EncodedImage]]
"""A picture's code by the model at a URI. Raises InvalidInput for one that cannot be read."""


class Backend(NamedTuple):
    """The parts that answer the routes.

    Attributes:
        serving: the version.
        batches: scans.
        encode: pictures to codes; None = only keys and codes are searched with.
        metrics: Prometheus text.
        settings: limits.
    """

    serving: Serving
    batches: Batches
    encode: Encode | None
    metrics: Callable[[], str]
    settings: ServiceSettings


# What is asked


class SearchRequest(BaseModel):
    """What to look for, by key or code; with a picture, the other fields."""

    model_config = ConfigDict(extra="forbid")

    key: str | None = Field(None, max_length=4096, description="key of an image of the index")
    code: str | None = Field(None, max_length=1024, description="code as hexadecimal bytes, bit 0 of byte 0 first")
    k: int | None = Field(None, ge=1, description="most results; 10, or with a radius the service's limit")
    radius: int | None = Field(
        None, ge=0, le=8192, description="only images whose codes differ in at most so many bits"
    )
    where: str | None = Field(None, max_length=4096, description="only images that match, such as `label in 3,5`")
    version: Annotated[str, Field(max_length=256)] | Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(
        None, description="an older version of the index, by number or tag"
    )
    exclude_self: bool = Field(False, description="leave the image of `key` out of its own results")


class Hit(BaseModel):
    """An image that was found."""

    key: str
    id: str
    distance: int
    picture: str | None
    uri: str | None = None


class SearchAnswer(BaseModel):
    """What was found, and in which version."""

    query: dict[str, Any]
    code: str
    bits: int
    version: int
    model: str | None
    hits: list[Hit]
    truncated: bool = Field(description="more images than `k` lie within `radius`")
    timings_ms: dict[str, float]
    request_id: str


class ErrorBody(BaseModel):
    """The kind of the error; its message says what was required, what was found, what to do."""

    kind: str
    message: str
    request_id: str


class Error(BaseModel):
    """Every answer that is not the one asked for."""

    error: ErrorBody


class _Form(SearchRequest):
    image: bytes = Field(
        description="a JPEG, PNG, WebP, GIF, BMP, TIFF or PNM file", json_schema_extra={"format": "binary"}
    )


_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "wrong input",
        401: "no token, or another",
        404: "no such key or version",
        408: "the body came too slowly",
        413: "too large",
        429: "too many pictures",
        503: "no version yet, or too many requests",
    }.items()
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": SearchRequest.model_json_schema()},
            "multipart/form-data": {"schema": _Form.model_json_schema()},
        },
    }
}


def make_app(backend: Backend, token: str = "") -> Border:
    """The whole service as one ASGI application."""
    settings = backend.settings
    app = routes(backend)
    most = int(settings.max_body_mb * 1e6)
    return Border(app, most_bytes=most, most_at_once=2 * settings.waiting, token=token)


def routes(backend: Backend) -> FastAPI:
    """The routes, without what stands around them."""
    answers, scraped = _Answers(backend), share(backend.metrics)
    app = FastAPIOffline(
        title="hashdist", version=__version__, redoc_url=None, summary="Images like this one, by their binary codes."
    )
    app.add_exception_handler(HashdistError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_error)  # Starlette's own 500 is plain text

    @app.get("/search", response_model=SearchAnswer, responses=_FAILURES, summary="Search by key or code")
    async def search_by_query(request: Request, asked: Annotated[SearchRequest, Query()]) -> Response:
        return await answers.search(request, asked, None)

    @app.post(
        "/search",
        response_model=SearchAnswer,
        responses={**_FAILURES, 415: {"model": Error, "description": "neither JSON nor a form"}},
        openapi_extra=_BODY,
        summary="Search by picture, key or code",
    )
    async def search_by_body(request: Request) -> Response:
        return await answers.search(request, *await _from_body(request))

    @app.get(
        "/pictures/{key:path}", response_class=Response, responses={**_FAILURES, 200: {"content": {"image/jpeg": {}}}}
    )
    async def picture(
        request: Request, key: str, size: Annotated[int, Query(ge=SIDES[0], le=SIDES[1])] = 256
    ) -> Response:
        """A small picture of an image of the index, by key."""
        return await answers.picture(request, key, size)

    @app.get("/version", responses={status: _FAILURES[status] for status in (401, 503)})
    async def version() -> Response:
        """What is served, and within which limits."""
        return _json(answers.version())

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the process answers."""
        return _json({"status": "ok"})

    @app.get("/readyz", responses={503: {"description": "no version is served yet"}})
    async def readyz() -> Response:
        """Whether searches are answered, and what stands in the way of the newest version."""
        status, reasons = backend.serving.state()
        return _json(
            {"status": status, "reasons": [limits.public(reason) for reason in reasons]},
            503 if status == "not ready" else 200,
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics of all replicas and workers, as Prometheus reads them."""
        return Response(await scraped(), media_type="text/plain; version=0.0.4")

    for path, (name, kind) in _PAGE.items():
        app.get(f"/{path}", include_in_schema=False)(_page(name, kind))
    return app


def share(made: Callable[[], str]) -> Callable[[], Awaitable[str]]:
    """Share the text of `made` among all that ask for it while it is being made, in a thread."""
    making: asyncio.Task[str] | None = None

    async def asked() -> str:
        nonlocal making
        if making is None or making.done():
            making = asyncio.ensure_future(asyncio.to_thread(made))
        return await asyncio.shield(making)

    return asked


def _page(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    data = files("hashdist.service").joinpath("page", name).read_bytes()
    headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}

    async def page() -> Response:
        return Response(data, media_type=kind, headers=headers)

    return page


async def _from_body(request: Request) -> tuple[SearchRequest, bytes | None]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            return SearchRequest.model_validate_json(await request.body()), None
        except ValidationError as error:
            raise InvalidInput(_problems(error.errors())) from error
    if kind != "multipart/form-data":
        raise HTTPException(415, "the body must be application/json or multipart/form-data")
    async with request.form(max_files=1, max_fields=_FIELDS) as form:
        fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
        given = [value for value in form.getlist("image") if isinstance(value, UploadFile)]
        data = await given[0].read() if given else None
        strangers = [name for name, value in form.multi_items() if isinstance(value, UploadFile) and name != "image"]
    if strangers:
        raise InvalidInput(f"the file of a form must be the field `image`, found `{strangers[0][:100]}`")
    try:
        return SearchRequest.model_validate({name: value for name, value in fields.items() if value != ""}), data
    except ValidationError as error:
        raise InvalidInput(_problems(error.errors())) from error


# What is answered


class _Answers:
    def __init__(self, backend: Backend) -> None:
        self._backend, self._settings, self._serving = backend, backend.settings, backend.serving
        self._pictures = Thumbnails(backend.settings.max_pixels)
        self._decoding = Bucket(backend.settings.images_per_s)
        self._opening = asyncio.Semaphore(_OPENED_AT_ONCE)

    async def search(self, request: Request, asked: SearchRequest, image: bytes | None) -> Response:
        started = time.perf_counter()
        depth = self._depth(asked, image)
        served = await self._version(asked.version)
        code, query = await self._code(served, asked, image)
        encoded = time.perf_counter()
        found = await self._backend.batches.search(served.index, code, depth + asked.exclude_self, asked.where or "")
        hits, truncated = self._hits(served, asked, found, depth)
        encode_s = encoded - started
        times = {"encode": encode_s, "search": found.search_s, "keys": found.keys_s}
        telemetry.QUERY_SECONDS.observe(encode_s, phase="encode")
        answer = request.scope["hashdist"]
        answer.noted = {"version": served.version, "k": depth, "by": next(iter(query))}
        return _json(
            {
                "query": query,
                "code": code.tobytes().hex(),
                "bits": served.index.bits,
                "version": served.version,
                "model": served.index.model,
                "hits": hits,
                "truncated": truncated,
                "timings_ms": {
                    name: round(value * 1e3, 3)
                    for name, value in {**times, "total": time.perf_counter() - started}.items()
                },
                "request_id": answer.request_id,
            }
        )

    def _depth(self, asked: SearchRequest, image: bytes | None) -> int:
        """How many results to look for, once it is clear that the question can be asked."""
        given = [name for name in ("key", "code") if getattr(asked, name) is not None] + ["image"] * (image is not None)
        if len(given) != 1:
            raise InvalidInput(f"one of key, code or image is required, found {' and '.join(given) or 'none'}")
        if asked.exclude_self and asked.key is None:
            raise InvalidInput("exclude_self is for searches by key")
        most = self._settings.max_k
        k = asked.k or (10 if asked.radius is None else most)
        if k > most:
            raise InvalidInput(f"k may be at most {most} here, found {k}")
        return k

    async def _version(self, version: str | int | None) -> Served:
        if version is None:
            return self._serving.now
        wanted = int(version) if str(version).isdecimal() and len(str(version)) < 19 else str(version)
        opened = self._serving.find_open(wanted)
        return opened if opened is not None else await self._older(wanted)

    async def _older(self, wanted: int | str) -> Served:
        """A version that has to be opened, or a tag: few at once, since that may take long. Raises Busy."""
        try:
            async with asyncio.timeout(_WAIT_S):
                await self._opening.acquire()
        except TimeoutError:
            raise Busy("older versions are opened one after the other; send it again later", 1.0) from None
        try:
            return await asyncio.to_thread(self._serving.at, wanted)
        finally:
            self._opening.release()

    async def _code(
        self, served: Served, asked: SearchRequest, image: bytes | None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        if asked.key is not None:
            return await asyncio.to_thread(code_of, served, asked.key), {"key": asked.key}
        if asked.code is not None:
            return _parse_code(asked.code, served.index.bits), {"code": asked.code}
        assert image is not None
        return await self._of_picture(served, image)

    async def _of_picture(self, served: Served, image: bytes) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        if self._backend.encode is None or served.model is None:
            raise InvalidInput("this service does not read pictures; search by key or code")
        if not served.model["reads_images"]:
            raise InvalidInput(f"this index is not searched by picture: {served.model['reason']}")
        await self._turn()
        encoded = await self._backend.encode(str(served.index.model_uri), image)
        size = {"width": encoded.width, "height": encoded.height, "bytes": len(image)}
        return encoded.code, {"image": size}

    async def _turn(self) -> None:
        """Wait for a picture's turn to be decoded. Raises Busy where that takes too long."""
        until = time.monotonic() + _WAIT_S
        while wait_s := self._decoding.wait_s():
            if time.monotonic() + wait_s > until:
                most = self._settings.images_per_s
                raise Busy(f"a replica decodes at most {most:g} pictures a second; send it again later", 1.0)
            await asyncio.sleep(wait_s)

    def _hits(
        self, served: Served, asked: SearchRequest, found: Answer, depth: int
    ) -> tuple[list[dict[str, Any]], bool]:
        within = len(found.ids)
        if asked.radius is not None:
            within = int(np.searchsorted(found.distances, asked.radius, "right"))
        hits = []
        rows = zip(found.keys[:within], found.ids[:within].tolist(), found.distances[:within].tolist(), strict=True)
        for key, id_, distance in rows:
            if asked.exclude_self and key == asked.key:
                continue
            shown = f"pictures/{_quote(key)}" if served.pictures is not None else None
            hit = {"key": key, "id": str(id_), "distance": distance, "picture": shown}
            if self._settings.uris:
                hit["uri"] = served.pictures.picture_uri(key) if served.pictures else None
            hits.append(hit)
        return hits[:depth], asked.radius is not None and within >= depth and within == len(found.ids)

    async def picture(self, request: Request, key: str, side: int) -> Response:
        served = self._serving.now
        tag = f'"{hashlib.sha256(f"{served.version} {side} {key}".encode(errors="replace")).hexdigest()[:32]}"'
        headers = {
            "Cache-Control": "private, max-age=300",
            "ETag": tag,
            "Content-Security-Policy": "default-src 'none'",
        }
        data = self._pictures.kept(served, key, side)
        if data is not None and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if data is None:
            await self._turn()
            data = await asyncio.to_thread(self._pictures.make, served, key, side)
        return Response(data, media_type="image/jpeg", headers=headers)

    def version(self) -> dict[str, Any]:
        served, settings = self._serving.now, self._settings
        index = served.index
        manifest = index.manifest
        stored = sum(shard["rows"] for shard in manifest["shards"])
        refused = self._serving.refused
        return {
            "hashdist": __version__,
            "index": {
                "version": index.version,
                "rows": index.rows,
                "bits": index.bits,
                "shards": len(manifest["shards"]),
                "dead_rows": stored - index.rows,
                "created_at": manifest["created_at"],
                "age_s": round(age_s(index), 3),
                "operation": manifest["operation"],
                "model": index.model,
            },
            "pictures": served.pictures is not None,
            "encoder": bool(served.model and served.model["reads_images"]),
            "limits": {"max_k": settings.max_k, "max_body_mb": settings.max_body_mb, "max_pixels": settings.max_pixels},
            "refused": refused and {**refused, "reason": limits.public(refused["reason"])},
            "store": {"away_s": round(self._serving.away_s, 3)},
        }


def _parse_code(text: str, bits: int) -> NDArray[np.uint8]:
    try:
        code = np.frombuffer(bytes.fromhex(text), np.uint8)
    except ValueError as error:
        raise InvalidInput("code must be hexadecimal bytes, such as 00ff10") from error
    if len(code) * 8 != bits:
        raise InvalidInput(f"the index has codes of {bits} bits, found {len(code) * 8}")
    return code


def _quote(key: str) -> str:
    """A key as the end of a relative URL; segments that a browser would take for steps up are hidden in one."""
    return quote(key, safe="" if {"", ".", ".."} & set(key.split("/")) else "/")


def _json(content: Any, status: int = 200) -> Response:
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return Response(body, status, media_type="application/json")


# Errors


async def _on_error(request: Request, error: Exception) -> Response:
    status, headers, body = limits.failure(error, request.scope["hashdist"].request_id)
    return Response(body, status, headers, media_type="application/json")


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _on_error(request, InvalidInput(_problems(error.errors())))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = limits.error_body(
        _KINDS.get(error.status_code, "InvalidInput"), str(error.detail), request.scope["hashdist"].request_id
    )
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of the first route only
        headers["Allow"] = ", ".join(_methods(request))
    return Response(body, error.status_code, headers, media_type="application/json")


def _methods(request: Request) -> list[str]:
    """The methods that some route of this path has."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    there = [route.methods or set() for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted(set().union(*there))


def _problems(problems: Any) -> str:
    """The problems that pydantic found, in a line."""
    said = []
    for problem in problems[:5]:
        where = ".".join(str(part) for part in problem["loc"] if part not in ("query", "body", "path"))
        said.append(f"{where[:100] or 'the body'}: {problem['msg']}")
    return "; ".join(said)
