"""Routes of the server: the page, its files, and the REST interface."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Path, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from pab import __version__
from pab.core.errors import InputError
from pab.search.page import templates
from pab.search.server.ids import IMAGE_ID
from pab.search.server.line import BusyError, Line
from pab.search.server.models import (
    MOST_MARKS,
    Folders,
    Health,
    MarksRequest,
    Picture,
    Problem,
    SearchRequest,
    SearchResponse,
)
from pab.search.server.security import (
    SMALL_BODY,
    UPLOAD_BODY,
    Access,
    Guard,
    cookie_name,
    log,
)
from pab.search.server.service import QueryError, Service, UnknownImageError

WAITING = 16  # searches that may wait, per search that may run
WAITING_PICTURES = 512  # pictures that may wait; one answer lists up to 100 results
SKIPPED = "X-Skipped-Marks"  # header of an annotation
KEPT_S = 600  # seconds for which a browser may show a picture from its cache
EXAMPLES = (
    "a person lying on the ground",
    "a man falls off a bicycle",
    "two people fighting in the street",
    "a woman in a red coat running",
)
PACKAGE = "pab.search.server"
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": words}
    for status, words in {
        401: "The token is missing or wrong",
        404: "No such image",
        413: "The body is too large",
        422: "The request is invalid or cannot be answered",
        429: "The server is busy; try again after Retry-After seconds",
    }.items()
}
ImageIdPath = Annotated[str, Path(pattern=IMAGE_ID, description="Id of an image of a result")]


def create_app(
    service: Service, access: Access, parallel: int = 1, examples: Sequence[str] = EXAMPLES
) -> ASGIApp:
    """Create the server's ASGI application.

    Args:
        service: answers the requests.
        access: rules that decide who may use the server.
        parallel: number of searches that run at a time, and of pictures that are read at a time.
        examples: queries to show on the empty page.
    """
    searches, pictures = Line(parallel, WAITING * parallel), Line(parallel, WAITING_PICTURES)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for line in (searches, pictures):
            line.close()
        service.close()

    app = FastAPI(
        title="Photo search", version=__version__, lifespan=lifespan,
        # FastAPI's documentation pages are off, because they load scripts from other sites.
        openapi_url="/api/openapi.json", docs_url=None, redoc_url=None,
    )  # fmt: skip
    _add_handlers(app)
    _add_pages(app, service, access, examples)
    _add_api(app, service, searches, pictures)
    return Guard(app, access)


def _add_api(app: FastAPI, service: Service, searches: Line, pictures: Line) -> None:
    # This describes the token for OpenAPI; the guard checks the token.
    token = [Security(HTTPBearer(auto_error=False))]

    def route(path: str, method: str = "GET", **options: Any) -> Callable[[Any], Any]:
        return app.api_route(
            f"/api/{path}", methods=[method], responses=PROBLEMS, dependencies=token, **options
        )

    @route("search", "POST", openapi_extra=_search_body())
    async def search(request: Request) -> SearchResponse:
        """Find images by a text, an image, or both.

        Send JSON, or a form with the JSON in the field `query` and a file in the field `image`.
        """
        query, upload = await _query_of(request)
        return await searches.run(service.search, query, upload)

    @route("images/{image}/facts")
    async def facts(image: ImageIdPath) -> Picture:
        """Describe an image of the index."""
        return await pictures.run(service.picture, image)

    @route("images/{image}", response_class=Response)
    async def whole(image: ImageIdPath, request: Request) -> Response:
        """Return an image as an upright JPEG without metadata, at most 2,400 px on a side."""
        return _jpeg(request, await pictures.run(service.whole, image))

    @route("thumbnails/{image}", response_class=Response)
    async def thumbnail(image: ImageIdPath, request: Request) -> Response:
        """Return a JPEG of at most 480 px on a side."""
        return _jpeg(request, await pictures.run(service.thumbnail, image))

    @route("folders")
    async def folders() -> Folders:
        """List the folders of the indexed images."""
        return await searches.run(service.folders)

    @route("annotation", "POST", response_class=Response)
    async def annotation(marks: MarksRequest) -> Response:
        """Convert marks to an annotation in JSON lines.

        Marks of images that the index no longer has are skipped; a header has their number.
        """
        text, skipped = await searches.run(service.annotation, marks)
        headers = {
            "Content-Disposition": f'attachment; filename="marks_{marks.form}.jsonl"',
            SKIPPED: str(skipped),
        }
        return Response(text, media_type="application/x-ndjson", headers=headers)

    @route("health")
    def health() -> Health:  # in a thread, because it may open a changed index
        """Report that the server works."""
        return Health(
            status="ok", version=__version__, images=service.index.rows,
            members=service.member_names, rerank=service.second_look is not None,
        )  # fmt: skip


def _add_pages(app: FastAPI, service: Service, access: Access, examples: Sequence[str]) -> None:
    pages = templates(PACKAGE)
    page, login_page = (pages.get_template(f"{name}.html.j2") for name in ("page", "login"))
    app.mount("/static", StaticFiles(directory=str(files(PACKAGE) / "static")))

    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:  # in a thread, because it may open a changed index
        opened, look = service.index, service.second_look
        facts = {
            "images": opened.rows, "examples": examples, "limit_mb": UPLOAD_BODY >> 20,
            "index_key": hashlib.sha256(os.fsencode(service.folder.absolute())).hexdigest()[:12],
            "most_marks": MOST_MARKS,
            "has_times": opened.manifest.source.get("kind") == "videos",
            "rerank_depth": None if look is None else look.depth,
        }  # fmt: skip
        return HTMLResponse(page.render(**facts))

    @app.get("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        if access.token is None:
            return RedirectResponse("/", 303)
        return HTMLResponse(login_page.render(query=request.url.query, wrong=False))

    @app.post("/login", include_in_schema=False)
    async def check_token(request: Request) -> Response:
        if access.token is None:
            return RedirectResponse("/", 303)
        fields = parse_qs((await request.body()).decode("utf-8", "replace"))
        query = request.url.query
        if not access.is_token(fields.get("token", [""])[0]):
            return HTMLResponse(login_page.render(query=query, wrong=True), 401)
        response = RedirectResponse(f"/?{query}" if query else "/", 303)
        encrypted = request.headers.get("origin", "").startswith("https:")  # by a proxy
        response.set_cookie(
            cookie_name(request.scope), access.cookie(),
            httponly=True, samesite="strict", secure=encrypted,
        )  # fmt: skip
        return response


def _add_handlers(app: FastAPI) -> None:
    def problem(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers=headers or None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        # A malformed id names no image.
        status = 404 if faults and faults[0]["loc"][:1] == ("path",) else 422
        return problem(status, "no such image" if status == 404 else _fault(faults))

    @app.exception_handler(QueryError)
    async def unanswerable(_: Request, error: QueryError) -> JSONResponse:
        return problem(422, str(error))

    @app.exception_handler(UnknownImageError)
    async def unknown(_: Request, __: UnknownImageError) -> JSONResponse:
        text = "no such image; the index may have changed, or the upload may have expired"
        return problem(404, text)

    @app.exception_handler(BusyError)
    async def busy(_: Request, __: BusyError) -> JSONResponse:
        return problem(429, "the server is busy; try again", **{"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            {"error": str(error.detail)}, error.status_code, headers=dict(error.headers or {})
        )

    @app.exception_handler(InputError)
    async def unusable(_: Request, error: InputError) -> JSONResponse:
        log(error)  # its text may name files, which the client must not learn
        return problem(500, "the index, an image or the model cannot be used; see the server's log")

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> JSONResponse:
        return problem(500, "internal error; see the server's log")  # the guard logs it


async def _query_of(request: Request) -> tuple[SearchRequest, bytes | None]:
    """Read a query as JSON, or as a form with a file.

    Raises:
        HTTPException: the body has another type or is a malformed form, or the file is too large.
        QueryError: the fields are invalid.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    upload: bytes | None = None
    if kind == "application/json":
        text: Any = await request.body()
    elif kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=1, max_part_size=SMALL_BODY) as form:
            if set(form) - {"query", "image"}:
                raise QueryError("expected the fields 'query' and 'image', found others")
            text, image = form.get("query", "{}"), form.get("image")
            if isinstance(text, UploadFile) or not isinstance(image, UploadFile):
                raise QueryError("expected JSON in the field 'query', and a file in 'image'")
            upload = await image.read()
        if len(upload) > UPLOAD_BODY:
            raise HTTPException(413, f"expected an image of at most {UPLOAD_BODY:,} bytes")
    else:
        raise HTTPException(415, "expected application/json or multipart/form-data")
    try:
        return SearchRequest.model_validate_json(text), upload
    except ValidationError as error:
        raise QueryError(_fault(error.errors(include_input=False, include_url=False))) from error


def _fault(faults: Sequence[Any]) -> str:
    """Describe the first fault of a request, without repeating what the client has sent."""
    first = faults[0]
    known = {*SearchRequest.model_fields, *MarksRequest.model_fields, "marks", "right"}
    where = ".".join(str(part) for part in first["loc"] if part in known or isinstance(part, int))
    kind = str(first["type"])
    words = "the JSON is invalid" if kind == "json_invalid" else str(first["msg"])
    return f"{where}: {words}" if where else words


def _jpeg(request: Request, content: bytes) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": f"private, max-age={KEPT_S}"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="image/jpeg", headers=headers)


def _search_body() -> dict[str, Any]:
    """Describe the two bodies of a search for OpenAPI."""
    schema = SearchRequest.model_json_schema()
    form = {
        "type": "object", "required": ["image"],
        "properties": {
            "query": {"type": "string", "description": "The JSON of a query", "default": "{}"},
            "image": {"type": "string", "format": "binary"},
        },
    }  # fmt: skip
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
