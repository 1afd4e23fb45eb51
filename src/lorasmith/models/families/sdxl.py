"""Stable Diffusion XL (Podell et al. 2023), through diffusers. B batch, L tokens, D width, h w latent sides."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorasmith.models.checkpoints.sdxl import OriginalSDXL
from lorasmith.models.families.base import PictureCodec, PipelineFamily, warn_of_cuts
from lorasmith.models.families.denoisers import UNetDenoiser, check_inputs, dtype_of
from lorasmith.models.families.sd import PREDICTION_NAMES, diffusion
from lorasmith.models.sources.components import Components
from lorasmith.models.text_encoders import Texts, tokens
from lorasmith.types import Cond

FACTOR = 8  # pixels along the side of a latent pixel


class SDXLDenoiser(UNetDenoiser):
    """Conditioning is {"text": [B,L,D], "pooled": [B,P]}, and "sizes" [B,6] where they are known."""

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


def text_of(encoders: Mapping[str, Any], cond: Cond) -> Cond:
    """Both encoders, {"ids": [B,L], "ids_2": [B,L]} -> {"text": [B,L,D], "pooled": [B,P]}.

    Tokens are read before the last layer, the pooled vector after the second encoder's (Podell et al. 2023, 2.1).
    """
    first = encoders["text_encoder"](cond["ids"], output_hidden_states=True)
    second = encoders["text_encoder_2"](cond["ids_2"], output_hidden_states=True)
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return {"text": text, "pooled": second.text_embeds}


def last_layer(encoders: Mapping[str, Any]) -> tuple[str, ...]:
    """The first encoder's, which is not read."""
    return (f"text_encoder.encoder.layers.{encoders['text_encoder'].config.num_hidden_layers - 1}.",)


class SDXLCodec(PictureCodec):
    """The autoencoder and both text encoders."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.tokenizers = {"text_encoder": pipe.tokenizer, "text_encoder_2": pipe.tokenizer_2}
        self.multiple = self.factor * 2 ** (len(pipe.unet.config["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Cond:
        """B texts -> {"text": [B,L,D], "pooled": [B,P]}, float32, or their tokens."""
        warn_of_cuts(texts, self.pipe.tokenizer, self.pipe.tokenizer.model_max_length)
        lengths = {name: tokenizer.model_max_length for name, tokenizer in self.tokenizers.items()}
        found = tokens(texts, self.tokenizers, lengths)
        if self.kept_tokens:
            return found
        encoders = {name: getattr(self.pipe, name) for name in self.tokenizers}
        ids = {name: value.to(self.pipe.text_encoder.device) for name, value in found.items()}
        return {name: value.float() for name, value in text_of(encoders, ids).items()}

    def encode_size(self, original: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Cond:
        """(W, H) of the picture as it was, (x, y) of its crop, and (W, H) of the crop -> {"sizes": [6]}."""
        sizes = [value for pair in (original, corner, size) for value in reversed(pair)]
        return {"sizes": torch.tensor(sizes, dtype=torch.float32)}


class SDXL(PipelineFamily):
    """The base model; the refiner, which is told other things, is refused."""

    ORIGINAL = OriginalSDXL()
    ENCODERS = ("vae", "text_encoder", "text_encoder_2")
    TEXTS: ClassVar[Texts | None] = Texts(
        {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}, text_of, last_layer
    )

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
