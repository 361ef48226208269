"""The web page and JSON endpoint of `python -m lora_dist.predict --serve`, on FastAPI."""

import asyncio
import gc
import html
import io
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from pydantic import BaseModel
from torch import Tensor

from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.deployment.classify import Row
from lora_dist.deployment.serve.batching import Batcher
from lora_dist.deployment.serve.metrics import CONTENT_TYPE, Metrics, MetricsMiddleware
from lora_dist.deployment.serve.request_limits import Guard
from lora_dist.deployment.serve.uploads import Limits, RefusedUploadError, check_name, decode
from lora_dist.errors import UserError
from lora_dist.model.adapter_set import AdapterSet
from lora_dist.model.classifier import Classifier
from lora_dist.model.decision import MULTI_LABEL
from lora_dist.processes.cores import available_cores

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
MAX_DECODERS = 4
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


class Score(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class Prediction(BaseModel):
    """The prediction for one file, with the fields of a JSON line of `predict`.

    The label is 'unknown' if the score is below the server's --min_confidence.
    """

    file: str
    label: str
    score: float
    top_k: list[Score]


class LabelSetPrediction(BaseModel):
    """The prediction of several labels for one file: labels above their thresholds, and the highest scores."""

    file: str
    labels: list[Score]
    top_k: list[Score]


class Predictions(BaseModel):
    """One prediction per file, in the order of the request."""

    predictions: list[Prediction] | list[LabelSetPrediction]


class Health(BaseModel):
    """The answer of a server that can classify: its state and the names of its adapters."""

    status: Literal["ok"]
    adapters: list[str]


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
    metrics, classifiers = Metrics(), served.classifiers
    batcher = Batcher(served, batch_size, device, metrics.add_batch)
    unexplained = _unexplained(classifiers)
    # An image of the largest allowed size needs about 600 MB while it is decoded and resized.
    decoders = ThreadPoolExecutor(min(MAX_DECODERS, available_cores()), thread_name_prefix="decoder")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A second Ctrl+C cancels the lifespan.
        with suppress(asyncio.CancelledError):
            yield
        decoders.shutdown(cancel_futures=True)
        batcher.close()

    # FastAPI's own documentation pages load scripts from other hosts.
    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, max_bytes=limits.body)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    page = Template((PAGE / "index.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(name),
        choice=_choice(classifiers),
        adapter="adapter=NAME&amp;" if len(classifiers) > 1 else "",
        top_k=min(top_k, max(len(one.labels) for one in classifiers.values())),
        megabytes=f"{limits.body / 1e6:g}",
        megapixels=f"{limits.pixels / 1e6:g}",
        files=limits.files,
        hint="" if unexplained else "<p>A click on a picture shows which parts speak for its class.</p>",
        explains="no" if unexplained else "yes",
    )

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return page

    @app.api_route("/page.{kind}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(kind: Literal["css", "js"]) -> FileResponse:
        return FileResponse(PAGE / f"page.{kind}")

    @app.get("/health", responses={503: {"description": "the model has stopped"}})
    async def health() -> Health:
        """Returns the names of the adapters that can classify, or 503 if the model has stopped."""
        if not batcher.is_alive:
            raise HTTPException(503, "the model has stopped")
        return Health(status="ok", adapters=list(classifiers))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_text() -> PlainTextResponse:
        """Returns counts of requests, images and batches, and durations, in the text format of Prometheus."""
        return PlainTextResponse(metrics.text(batcher.waiting), media_type=CONTENT_TYPE)

    @app.exception_handler(RefusedUploadError)
    async def refuse(_: Request, refusal: RefusedUploadError) -> JSONResponse:
        return JSONResponse({"detail": str(refusal)}, refusal.status)

    @app.exception_handler(RequestValidationError)
    async def refuse_form(request: Request, error: RequestValidationError) -> Response:
        field, images = ("file", "an image") if request.url.path == "/explain" else ("files", "images")
        if not any(problem["loc"] == ("body", field) for problem in error.errors()):
            return await request_validation_exception_handler(request, error)
        url = request.url.replace(query="")
        detail = f"send {images} in the field '{field}' of a form: curl -F {field}=@one.jpg {url}"
        return JSONResponse({"detail": detail}, 422)

    def prepare(chosen: str, data: bytes, file: str) -> Tensor:
        transforms = batcher.transforms[chosen]
        image = decode(data, file, limits.pixels, transforms.conversion)
        try:
            return transforms.resized([transforms.centred(image, file)])
        except UnreadableImageError as error:
            raise RefusedUploadError(413, str(error)) from error

    refusals: dict[int | str, dict[str, Any]] = {status: {"description": text} for status, text in REFUSALS.items()}

    @app.post("/predict", responses=refusals)
    async def predict(
        files: list[UploadFile],
        top_k: Annotated[int, Query(ge=1, description="number of classes per file")] = top_k,
        adapter: Annotated[str | None, Query(description="name of an adapter, if there are several")] = None,
    ) -> Predictions:
        """Returns the most likely classes of each file. A request with a bad file is refused as a whole."""
        loop = asyncio.get_running_loop()
        chosen = _chosen(adapter, list(classifiers))
        if len(files) > limits.files:
            raise RefusedUploadError(413, f"{len(files)} files; at most {limits.files} are allowed")
        names = [check_name(file.filename or "") for file in files]
        contents = [(await file.read(), name) for file, name in zip(files, names, strict=True)]
        images = await asyncio.gather(
            *(loop.run_in_executor(decoders, prepare, chosen, *content) for content in contents)
        )
        probabilities = await asyncio.gather(*(asyncio.wrap_future(batcher.submit(chosen, image)) for image in images))
        return _predictions(classifiers[chosen], names, torch.stack(probabilities), top_k, min_confidence)

    @app.post(
        "/explain",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, **refusals},
    )
    async def explain(
        file: UploadFile,
        adapter: Annotated[str | None, Query(description="name of an adapter, if there are several")] = None,
    ) -> Response:
        """Returns a PNG file: the image as the model sees it, with a heat map of the parts that speak for its class, or
        for the label with the highest score."""
        if unexplained:
            raise HTTPException(501, unexplained)
        chosen = _chosen(adapter, list(classifiers))
        name = check_name(file.filename or "")
        image = await asyncio.get_running_loop().run_in_executor(decoders, prepare, chosen, await file.read(), name)
        content = io.BytesIO()
        (await asyncio.wrap_future(batcher.explain(chosen, image))).save(content, "PNG")
        return Response(content.getvalue(), media_type="image/png")

    return app


def _predictions(
    classifier: Classifier, files: list[str], probabilities: Tensor, top_k: int, min_confidence: float | None
) -> Predictions:
    """Returns the answer for files with these probabilities [B, classes]."""
    best, above = classifier.top_k(probabilities, top_k), classifier.chosen(probabilities)
    rows = (Row(file, scored, labels=labels) for file, scored, labels in zip(files, best, above, strict=True))
    # All predictions of a classifier are of the same type.
    return Predictions(predictions=[_prediction(row.known_from(min_confidence)) for row in rows])  # type: ignore[arg-type]


def _prediction(row: Row) -> Prediction | LabelSetPrediction:
    top_k = _scored(row.top_k)
    if row.labels is not None:
        return LabelSetPrediction(file=row.path, labels=_scored(row.labels), top_k=top_k)
    return Prediction(file=row.path, label=row.label, score=top_k[0].score, top_k=top_k)


def _scored(classes: list[tuple[str, float]]) -> list[Score]:
    return [Score(label=label, score=score) for label, score in classes]


def _unexplained(classifiers: Mapping[str, Classifier]) -> str | None:
    """Returns the reason why predictions cannot be explained; None if they can."""
    # ONNX Runtime computes no gradients.
    if not all(any(True for _ in one.model.parameters()) for one in classifiers.values()):
        return "predictions of an ONNX file cannot be explained: serve the adapter or model"
    return None


def _chosen(adapter: str | None, names: list[str]) -> str:
    """The name of the adapter of a request, which may leave it out if there is only one."""
    if adapter is None and len(names) == 1:
        return names[0]
    if adapter not in names:
        problem = "there are several adapters" if adapter is None else f"there is no adapter {adapter!r}"
        raise HTTPException(422, f"{problem}; add ?adapter=NAME with one of these names: {', '.join(names)}")
    return adapter


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
