"""Classifies and explains uploaded files: decodes them in threads, and gives them to the batches of the model."""

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from fastapi import HTTPException, UploadFile
from torch import Tensor

from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.deployment.serve.batching import Batcher
from lora_dist.deployment.serve.request_limits import Limits
from lora_dist.deployment.serve.responses import Predictions, predictions_of
from lora_dist.deployment.serve.uploads import RefusedUploadError, check_name, decode
from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import AdapterSet
from lora_dist.processes.cores import available_cores

MAX_DECODERS = 4


class Service:
    """Answers requests with the files that they upload.

    Attributes:
        classifiers: by the names of their adapters.
        limits: of a request.
        unexplained: the reason why predictions cannot be explained; None if they can.
    """

    def __init__(self, served: AdapterSet, batcher: Batcher, limits: Limits, min_confidence: float | None) -> None:
        """
        Args:
            served: the model, with one or several adapters.
            batcher: runs the model.
            limits: of a request.
            min_confidence: predictions below it are 'unknown'.
        """
        self.classifiers = served.classifiers
        self.limits = limits
        self._batcher = batcher
        self._min_confidence = min_confidence
        # ONNX Runtime computes no gradients.
        has_gradients = all(any(True for _ in one.model.parameters()) for one in served.classifiers.values())
        self.unexplained = (
            None if has_gradients else "predictions of an ONNX file cannot be explained: serve the adapter or model"
        )
        # An image of the largest allowed size needs about 600 MB while it is decoded and resized.
        self._decoders = ThreadPoolExecutor(min(MAX_DECODERS, available_cores()), thread_name_prefix="decoder")

    async def predict(self, files: Sequence[UploadFile], top_k: int, adapter: str | None) -> Predictions:
        """Returns the `top_k` most likely classes of each file.

        Raises:
            RefusedUploadError: there are too many files, or one is not an image that is allowed.
            HTTPException: 422 if no adapter has this name.
        """
        name = self._adapter(adapter)
        if len(files) > self.limits.files:
            raise RefusedUploadError(413, f"{len(files)} files; at most {self.limits.files} are allowed")
        names = [check_name(file.filename or "") for file in files]
        contents = [await file.read() for file in files]
        images = await asyncio.gather(*map(self._decoded, [name] * len(files), contents, names))
        futures = [self._batcher.submit(name, image) for image in images]
        probabilities = torch.stack(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        return predictions_of(self.classifiers[name], names, probabilities, top_k, self._min_confidence)

    async def explain(self, file: UploadFile, adapter: str | None) -> bytes:
        """Returns the image with a heat map of its class, as a PNG file. Errors as `predict`, and 501 for ONNX and
        models without a feature map."""
        if self.unexplained:
            raise HTTPException(501, self.unexplained)
        name, file_name = self._adapter(adapter), check_name(file.filename or "")
        image = await self._decoded(name, await file.read(), file_name)
        content = io.BytesIO()
        try:
            picture = await asyncio.wrap_future(self._batcher.explain(name, image))
        except UserError as error:
            raise HTTPException(501, str(error)) from error
        picture.save(content, "PNG")
        return content.getvalue()

    def close(self) -> None:
        """Cancels images that wait to be decoded; ends the model's thread once it has answered all others."""
        self._decoders.shutdown(cancel_futures=True)
        self._batcher.close()

    def _adapter(self, name: str | None) -> str:
        """Returns the name of the adapter of a request, which may leave it out if there is only one."""
        names = list(self.classifiers)
        if name is None and len(names) == 1:
            return names[0]
        if name not in names:
            problem = "there are several adapters" if name is None else f"there is no adapter {name!r}"
            raise HTTPException(422, f"{problem}; add ?adapter=NAME with one of these names: {', '.join(names)}")
        return name

    async def _decoded(self, adapter: str, data: bytes, file: str) -> Tensor:
        """Returns the pixels [1, 3, H, W] of an uploaded image, decoded in another thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, self._decode, adapter, data, file)

    def _decode(self, adapter: str, data: bytes, file: str) -> Tensor:
        transforms = self._batcher.transforms[adapter]
        image = decode(data, file, self.limits.pixels, transforms.conversion)
        try:
            return transforms.resized([transforms.centred(image, file)])
        except UnreadableImageError as error:
            raise RefusedUploadError(413, str(error)) from error
