"""Stable Diffusion XL (Podell et al. 2023), through diffusers. B batch, L tokens, D width, h w latent sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.families.components import Components
from lorasmith.families.pipeline import PictureCodec, PipelineFamily, check_inputs, dtype_of, warn_of_cuts
from lorasmith.families.sd import PREDICTION_NAMES, diffusion
from lorasmith.noise import Diffusion
from lorasmith.types import Cond

FACTOR = 8  # pixels along the side of a latent pixel


@dataclass(frozen=True)
class SDXLDenoiser:
    """The UNet and its process."""

    unet: Any  # a UNet2DConditionModel
    process: Diffusion

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,4,h,w], t [B], cond {"text": [B,L,D], "pooled": [B,P]} -> the UNet's output [B,4,h,w], float32.

        "sizes" [B,6] in cond: height and width of the picture as it was, top and left of its crop, height and width of
        the crop, in pixels. Without them the picture is taken as whole.
        """
        config, dtype = self.unet.config, dtype_of(self.unet)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        widths = {"text": config["cross_attention_dim"], "pooled": pooled}
        check_inputs(x_t, cond, channels=config["in_channels"], widths=widths)
        size = [side * FACTOR for side in x_t.shape[-2:]]
        sizes = cond.get("sizes", torch.tensor([*size, 0, 0, *size], device=x_t.device).expand(len(x_t), 6))
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": sizes.to(dtype)}
        return self.unet(x_t.to(dtype), t, cond["text"].to(dtype), added_cond_kwargs=added).sample.float()

    def file_key(self, path: str) -> str:
        """unet.down_blocks.1… -> lora_unet_down_blocks_1…: kohya's names."""
        return f"lora_{path}".replace(".", "_")


class SDXLCodec(PictureCodec):
    """The autoencoder and both text encoders."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.multiple = self.factor * 2 ** (len(pipe.unet.config["block_out_channels"]) - 1)

    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D], "pooled": [B,P]}, float32."""
        warn_of_cuts(texts, self.pipe.tokenizer, self.pipe.tokenizer.model_max_length)
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"text": text.float(), "pooled": pooled.float()}

    def encode_size(self, original: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Cond:
        """(W, H) of the picture as it was, (x, y) of its crop, and (W, H) of the crop -> {"sizes": [6]}."""
        sizes = [value for pair in (original, corner, size) for value in reversed(pair)]
        return {"sizes": torch.tensor(sizes, dtype=torch.float32)}


class SDXL(PipelineFamily):
    """The base model; the refiner, which is told other things, is refused."""

    ENCODERS = ("vae", "text_encoder", "text_encoder_2")

    def denoiser_of(self, components: Components) -> SDXLDenoiser:
        if components.config("requires_aesthetics_score"):
            raise ValueError(
                "model must be SDXL's base, got its refiner, which is told an aesthetic score instead of sizes"
            )
        return SDXLDenoiser(components.net("unet"), diffusion(components.scheduler))

    def codec_of(self, pipe: Any) -> SDXLCodec:
        return SDXLCodec(pipe)

    def metadata(self) -> dict[str, str]:
        assert isinstance(self.denoiser, SDXLDenoiser)
        return {
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.prediction_type": PREDICTION_NAMES[self.denoiser.process.prediction],
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
        }
