"""Image processors of several kinds, all of 32 pixels or so."""

from typing import Any

from transformers import BitImageProcessor, ConvNextImageProcessor, MobileViTImageProcessor, ViTImageProcessor

PROCESSORS: dict[str, Any] = {
    "vit": lambda: ViTImageProcessor(size={"height": 32, "width": 32}),
    "not square": lambda: ViTImageProcessor(size={"height": 24, "width": 40}),
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "mobilevit": lambda: MobileViTImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, do_flip_channel_order=True
    ),
    "resize and crop": lambda: BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, do_normalize=True
    ),
}
