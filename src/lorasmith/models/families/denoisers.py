"""What denoisers of diffusers' nets share: a family fills in how its net is called.

B batch, C channels, f h w latent frames and sides, L tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorasmith.diffusion.process import Diffusion, Flow, TokenShift
from lorasmith.types import Cond


@dataclass(frozen=True)
class TransformerDenoiser(ABC):
    """A transformer and its flow."""

    transformer: Any  # of diffusers
    process: Flow

    WIDTHS: ClassVar[Mapping[str, str]] = {"text": "joint_attention_dim"}
    """{a part of the conditioning: what the transformer's config calls its width}."""
    SQUARE: ClassVar[int] = 1
    """The side of the squares of latent pixels that are the transformer's channels."""
    AXES: ClassVar[str] = "h,w"

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {name of WIDTHS: [B,L,D] or [B,D], …} -> eps - x0 [B,C,h,w], float32.

        ValueError where the latents or the conditioning are another model's.
        """
        config, dtype = self.transformer.config, dtype_of(self.transformer)
        widths = {name: config[key] for name, key in self.WIDTHS.items()}
        check_inputs(x_t, cond, channels=config["in_channels"] // self.SQUARE**2, widths=widths, axes=self.AXES)
        given = {name: cond[name].to(dtype) for name in widths}
        return self.output(x_t.to(dtype), t, cond | given).float()

    @abstractmethod
    def output(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The same from inputs that fit and are in the transformer's dtype."""

    def file_key(self, path: str) -> str:
        return path


@dataclass(frozen=True)
class UNetDenoiser(ABC):
    """A UNet and its process."""

    unet: Any  # a UNet2DConditionModel
    process: Diffusion

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,4,h,w], t [B], cond {"text": [B,L,D], …} -> the UNet's output [B,4,h,w], float32."""

    def file_key(self, path: str) -> str:
        """unet.down_blocks.0… -> lora_unet_down_blocks_0…: kohya's names."""
        return f"lora_{path}".replace(".", "_")


def dtype_of(net: nn.Module) -> torch.dtype:
    """What a net's inputs must be; its first parameter's, as diffusers' own property walks all modules."""
    return next(net.parameters()).dtype


def flow_of(scheduler: Mapping[str, Any], patch: int = 2) -> Flow:
    """The flow of a scheduler's config, with its shift, be it one for all sizes or by the number of tokens."""
    if scheduler.get("use_dynamic_shifting"):
        if scheduler.get("time_shift_type", "exponential") != "exponential":
            raise ValueError(f"time_shift_type must be exponential, got {scheduler['time_shift_type']!r}")
        few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        return Flow(by_size=TokenShift(low - slope * few, slope, patch))
    return Flow(float(scheduler.get("flow_shift", scheduler.get("shift", 1.0))))


def read_tokens(cond: Cond) -> Tensor:
    """Which tokens are read, bool [B,L]: all of them where conditioning has no "mask".

    ValueError where the mask is of another length than the text.
    """
    text = cond["text"]
    if "mask" not in cond:
        return text.new_ones(text.shape[:2], dtype=torch.bool)
    mask = cond["mask"] > 0
    if mask.shape != text.shape[:2]:
        raise ValueError(
            f"positive must hold a mask as long as text, {list(text.shape[1:2])}, got {list(mask.shape[1:])}"
        )
    return mask


def mask_of(cond: Cond) -> Tensor | None:
    """The tokens that are read, bool [B,L]; None where all are, as attention is faster without a mask."""
    mask = read_tokens(cond)
    return None if mask.all() else mask


def refuse_odd(latents: Tensor) -> None:
    """ValueError where latents [B,C,h,w] cannot be cut into squares of 2 x 2."""
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"latents must have even sides for this model, got {[height, width]}")


def packed(latents: Tensor) -> Tensor:
    """latents [B,C,h,w] -> tokens [B,h/2 w/2,4C], each a square of 2 x 2; ValueError where a side is odd."""
    refuse_odd(latents)
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The opposite: tokens [B,h/2 w/2,4C] -> latents [B,C,h,w]."""
    batch, _, channels = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def check_inputs(x_t: Tensor, cond: Cond, *, channels: int, widths: Mapping[str, int], axes: str = "h,w") -> None:
    """ValueError where latents [B,C,*axes] or conditioning of these widths are another model's."""
    if x_t.ndim != 2 + len(axes.split(",")) or x_t.shape[1] != channels:
        raise ValueError(f"latents must be [N,{channels},{axes}] for this model, got {[len(x_t), *x_t.shape[1:]]}")
    for name, width in widths.items():
        if name not in cond or cond[name].shape[-1] != width:
            shape = f"[L,{width}]" if name == "text" else f"[{width}]"
            found = f"width {cond[name].shape[-1]}" if name in cond else f"only {', '.join(cond) or 'nothing'}"
            raise ValueError(f"positive must hold {name} {shape} for this model, got {found}")
