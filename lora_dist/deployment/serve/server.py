"""The serving page and its JSON endpoint: FastAPI, `python -m lora_dist.predict --serve`."""

import asyncio
import html
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from string import Template
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Query, UploadFile
from fastapi.responses import FileResponse, HTMLResponse
from pydantic import BaseModel
from torch import Tensor

from lora_dist.deployment.serve.batching import Batcher
from lora_dist.deployment.serve.guard import Guard
from lora_dist.deployment.serve.uploads import Limits, RefusedUploadError, check_name, decode
from lora_dist.errors import UserError
from lora_dist.model.classifier import Classifier

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
READING = ["GET", "HEAD"]
MOST_DECODERS = 4
GRACE = 3
"""Seconds that the server waits for open requests when it ends."""


class Score(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class Prediction(BaseModel):
    """What is known of one file: as a row of `predict`, with `file` for its name."""

    file: str
    label: str
    score: float
    top_k: list[Score]


class Predictions(BaseModel):
    """One prediction a file, in the order of the request."""

    predictions: list[Prediction]


def make_app(
    classifier: Classifier, name: str, limits: Limits, *, top_k: int, batch_size: int, device: torch.device
) -> FastAPI:
    """The page at `/` and the endpoint at `/predict`.

    Args:
        classifier: to ask.
        name: of the model, for the page.
        limits: of a request.
        top_k: classes to name where a request does not say.
        batch_size: images in a forward pass.
        device: to run the model on.
    """
    batcher = Batcher(classifier, batch_size, device)
    # Few at once: an image of the largest size allowed takes some 600 MB while it is decoded and resized.
    decoders = ThreadPoolExecutor(min(MOST_DECODERS, os.cpu_count() or 1), thread_name_prefix="decoder")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # The second Ctrl+C cancels.
        with suppress(asyncio.CancelledError):
            yield
        decoders.shutdown(cancel_futures=True)
        batcher.close()

    # Its own pages for the API load scripts from elsewhere.
    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, most=limits.body)
    page = Template((PAGE / "index.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(name), classes=len(classifier.labels), top_k=min(top_k, len(classifier.labels)),
        megabytes=f"{limits.body / 1e6:g}", megapixels=f"{limits.pixels / 1e6:g}",
    )  # fmt: skip

    @app.api_route("/", methods=READING, response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return page

    @app.api_route("/page.css", methods=READING, include_in_schema=False)
    async def style() -> FileResponse:
        return FileResponse(PAGE / "page.css")

    @app.api_route("/page.js", methods=READING, include_in_schema=False)
    async def script() -> FileResponse:
        return FileResponse(PAGE / "page.js")

    def prepare(data: bytes, file: str) -> Tensor:
        return batcher.transforms.resized([decode(data, file, limits.pixels)])

    @app.post("/predict", responses={status: {"description": text} for status, text in REFUSALS.items()})
    async def predict(
        files: list[UploadFile], top_k: Annotated[int, Query(ge=1, description="classes to name")] = top_k
    ) -> Predictions:
        """The most likely classes of each file; all files of a request, or none."""
        loop = asyncio.get_running_loop()
        try:
            if len(files) > limits.files:
                raise RefusedUploadError(413, f"{len(files)} files, and {limits.files} are allowed")
            names = [check_name(file.filename or "") for file in files]
            contents = [(await file.read(), name) for file, name in zip(files, names, strict=True)]
            images = await asyncio.gather(*(loop.run_in_executor(decoders, prepare, *content) for content in contents))
        except RefusedUploadError as refusal:
            raise HTTPException(refusal.status, str(refusal)) from refusal
        probabilities = await asyncio.gather(*(asyncio.wrap_future(batcher.submit(image)) for image in images))
        rows = zip(names, probabilities, strict=True)
        return Predictions(predictions=[_prediction(file, row, classifier.labels, top_k) for file, row in rows])

    return app


REFUSALS = {
    400: "a file name with a path in it, or no multipart form",
    408: "the upload came too slowly",
    413: "a request, an image or the number of files is too large",
    415: "a file is not an image of an allowed type",
    422: "a file is empty or damaged, or a parameter is wrong",
    503: "too many uploads at once",
}


def _prediction(file: str, probabilities: Tensor, labels: list[str], top_k: int) -> Prediction:
    best = probabilities.topk(min(top_k, len(labels)))
    scores = [
        Score(label=labels[index], score=value)
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return Prediction(file=file, label=scores[0].label, score=scores[0].score, top_k=scores)


def run(app: FastAPI, host: str, port: int) -> None:
    """Serves until it is interrupted.

    Args:
        app: to serve.
        host: name or address to listen on.
        port: 0 for any that is free.

    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; --port 0 takes a free one") from error
    with listener:
        shown, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(shown).is_loopback:
            logger.warning("listening on %s: whoever reaches this machine can use it, without a password", shown)
        logger.info("serving on http://%s:%d (stop with Ctrl+C)", f"[{shown}]" if ":" in shown else shown, port)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
        # uvicorn passes the interrupt on once it has ended, unless whoever started this has it ignored.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
        logger.info("stopped")
