"""The web page and JSON endpoint of `python -m lora_dist.predict --serve`, on FastAPI."""

import asyncio
import gc
import html
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, UploadFile
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response

from lora_dist.deployment.serve.batching import Batcher
from lora_dist.deployment.serve.metrics import CONTENT_TYPE, Metrics, MetricsMiddleware
from lora_dist.deployment.serve.request_limits import Guard, Limits
from lora_dist.deployment.serve.responses import Health, Predictions
from lora_dist.deployment.serve.service import Service
from lora_dist.deployment.serve.uploads import RefusedUploadError
from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import AdapterSet
from lora_dist.model.trained.classifier import Classifier
from lora_dist.model.trained.decision import MULTI_LABEL

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
GRACE_SECONDS = 3
"""Time that open requests get when the server shuts down."""
REFUSALS = {
    400: "a file name contains a path, or the body is not a multipart form",
    408: "the upload took too long",
    413: "a request, an image or the number of files is too large",
    415: "a file is not an image of an allowed type",
    422: "a file is empty or damaged, or a parameter is invalid",
    503: "too many uploads at once",
}
Adapter = Annotated[str | None, Query(description="name of an adapter, if there are several")]


def make_app(
    served: AdapterSet,
    name: str,
    limits: Limits,
    *,
    top_k: int,
    batch_size: int | None,
    device: torch.device,
    min_confidence: float | None = None,
) -> FastAPI:
    """Returns the app with the page at `/`, titled `name`, and the endpoints `/predict`, `/explain`, `/health` and
    `/metrics`."""
    metrics = Metrics()
    batcher = Batcher(served, batch_size, device, metrics.add_batch)
    service = Service(served, batcher, limits, min_confidence)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A second Ctrl+C cancels the lifespan.
        with suppress(asyncio.CancelledError):
            yield
        service.close()

    # FastAPI's own documentation pages load scripts from other hosts.
    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, max_bytes=limits.body)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    _add_page(app, _page(name, service, top_k))
    _add_status(app, batcher, list(served.classifiers), metrics)
    _add_predictions(app, service, top_k)
    return app


def _add_page(app: FastAPI, page: str) -> None:
    """Adds `/` and the style and script of its page."""

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return page

    @app.api_route("/page.{kind}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(kind: Literal["css", "js"]) -> FileResponse:
        return FileResponse(PAGE / f"page.{kind}")


def _add_status(app: FastAPI, batcher: Batcher, adapters: list[str], metrics: Metrics) -> None:
    """Adds `/health` and `/metrics`."""

    @app.get("/health", responses={503: {"description": "the model has stopped"}})
    async def health() -> Health:
        """Returns the names of the adapters that can classify, or 503 if the model has stopped."""
        if not batcher.is_alive:
            raise HTTPException(503, "the model has stopped")
        return Health(status="ok", adapters=adapters)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_text() -> PlainTextResponse:
        """Returns counts of requests, images and batches, and durations, in the text format of Prometheus."""
        return PlainTextResponse(metrics.text(batcher.waiting), media_type=CONTENT_TYPE)


def _add_predictions(app: FastAPI, service: Service, default_top_k: int) -> None:
    """Adds `/predict` and `/explain`."""
    refusals: dict[int | str, dict[str, Any]] = {status: {"description": text} for status, text in REFUSALS.items()}

    @app.exception_handler(RefusedUploadError)
    async def refuse(_: Request, refusal: RefusedUploadError) -> JSONResponse:
        return JSONResponse({"detail": str(refusal)}, refusal.status)

    @app.exception_handler(RequestValidationError)
    async def refuse_form(request: Request, error: RequestValidationError) -> Response:
        field, images = ("file", "an image") if request.url.path == "/explain" else ("files", "images")
        # An answer of FastAPI repeats the content of a field without a file name.
        if not any(problem["loc"][0] == "body" for problem in error.errors()):
            return await request_validation_exception_handler(request, error)
        url = request.url.replace(query="")
        detail = f"send {images} in the field '{field}' of a form: curl -F {field}=@one.jpg {url}"
        return JSONResponse({"detail": detail}, 422)

    @app.post("/predict", responses=refusals)
    async def predict(
        files: list[UploadFile],
        top_k: Annotated[int, Query(ge=1, description="number of classes per file")] = default_top_k,
        adapter: Adapter = None,
    ) -> Predictions:
        """Returns the most likely classes of each file. A request with a bad file is refused as a whole."""
        return await service.predict(files, top_k, adapter)

    @app.post(
        "/explain",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, **refusals},
    )
    async def explain(file: UploadFile, adapter: Adapter = None) -> Response:
        """Returns a PNG file: the image as the model sees it, with a heat map of the parts that speak for its class, or
        for the label with the highest score."""
        return Response(await service.explain(file, adapter), media_type="image/png")


def _page(name: str, service: Service, top_k: int) -> str:
    """Returns the HTML of the page."""
    classifiers, limits = service.classifiers, service.limits
    return Template((PAGE / "index.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(name),
        choice=_choice(classifiers),
        adapter="adapter=NAME&amp;" if len(classifiers) > 1 else "",
        top_k=min(top_k, max(len(one.labels) for one in classifiers.values())),
        megabytes=f"{limits.body / 1e6:g}",
        megapixels=f"{limits.pixels / 1e6:g}",
        files=limits.files,
        hint="" if service.unexplained else "<p>A click on a picture shows which parts speak for its class.</p>",
        explains="no" if service.unexplained else "yes",
    )


def _choice(classifiers: Mapping[str, Classifier]) -> str:
    """Returns HTML: the number of classes, or for several adapters a choice of one of them."""
    if len(classifiers) == 1:
        return f"<p>{_size(next(iter(classifiers.values())))}</p>"
    options = (
        f'<option value="{html.escape(name)}">{html.escape(name)} ({_size(one)})</option>'
        for name, one in classifiers.items()
    )
    return f'<p><label>Adapter <select id="adapter">{"".join(options)}</select></label></p>'


def _size(classifier: Classifier) -> str:
    return f"{len(classifier.labels)} {'labels' if classifier.decision.problem_type == MULTI_LABEL else 'classes'}"


def run(app: FastAPI, host: str, port: int) -> None:
    """Serves until interrupted; port 0 takes a free port.

    Raises:
        UserError: the server cannot listen on this address.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes a free port") from error
    with listener:
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS)
        config.load()
        # Without this, the garbage collector scans all objects of the model and its libraries every few hundred
        # requests, and the model waits.
        gc.collect()
        gc.freeze()
        shown, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(shown).is_loopback:
            logger.warning("listening on %s: anyone who reaches this machine can use it, without a password", shown)
        logger.info("serving on http://%s:%d (stop with Ctrl+C)", f"[{shown}]" if ":" in shown else shown, port)
        # uvicorn raises the interrupt again after its shutdown.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
        logger.info("stopped")
