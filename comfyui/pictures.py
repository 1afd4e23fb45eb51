"""Pictures between ComfyUI's tensors [B,H,W,3] in 0 to 1, lorasmith's [B,3,H,W] in -1 to 1, and files."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lorasmith.reporting.loss_plot import losses_figure


def loss_picture(losses: Sequence[float]) -> Image.Image:
    """losses, any number of them, finite or not -> their plot."""
    content = io.BytesIO()
    losses_figure(losses).savefig(content, format="png")
    return Image.open(content).convert("RGB")


def tensor_of(picture: Image.Image) -> Tensor:
    """A picture -> [1,H,W,3]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def comfy_pixels(pixels: Tensor) -> Tensor:
    """[3,H,W] in -1 to 1 -> [1,H,W,3] in 0 to 1."""
    return ((pixels + 1) / 2).permute(1, 2, 0)[None].contiguous()
