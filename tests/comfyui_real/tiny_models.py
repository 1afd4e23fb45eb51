"""Tiny models of ComfyUI's own classes, with random weights: SD 1 and 2, SDXL, SD 3, Flux."""

from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from torch import Tensor

UNET = {
    "image_size": 32, "out_channels": 4, "in_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": (1, 2), "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "use_spatial_transformer": True, "legacy": False, "use_temporal_attention": False,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 20,
    "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "adm_in_channels": 24, "input_size": None, "num_patches": 64,
    "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "qk_norm": "rms", "context_size": 20,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 64}},
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A model with what it takes."""

    patcher: Any
    channels: int
    width: int  # of a token
    pooled: int | None = None
    guidance: float | None = None

    def latents(self, num: int, h: int = 8, w: int = 8) -> dict[str, Tensor]:
        """As VAEEncode gives them."""
        return {"samples": torch.randn(num, self.channels, h, w, generator=torch.Generator().manual_seed(1))}

    def positive(self, num: int, tokens: int = 6) -> list[Any]:
        """One entry for each latent, all different."""
        generator = torch.Generator().manual_seed(2)
        entries = []
        for _ in range(num):
            extra: dict[str, Any] = {}
            if self.pooled is not None:
                extra["pooled_output"] = torch.randn(1, self.pooled, generator=generator)
            if self.guidance is not None:
                extra["guidance"] = self.guidance
            entries.append([torch.randn(1, tokens, self.width, generator=generator), extra])
        return entries


def _patcher(config: Any, dtype: torch.dtype) -> Any:
    """A patcher of the model, whose random weights are the same in every process."""
    config.set_inference_dtype(dtype, None)
    config.unet_config["dtype"] = dtype
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.get_model({})
        for parameter in model.diffusion_model.parameters():
            torch.nn.init.normal_(parameter, std=0.5 * max(1, parameter[0].numel()) ** -0.5)
        for module in model.diffusion_model.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                torch.nn.init.ones_(module.weight)
        for buffer in model.diffusion_model.buffers():
            torch.nn.init.normal_(buffer, std=0.5)
    model.diffusion_model.to(dtype)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """sd1, sd2 (velocity), sdxl, sd3 or flux."""
    models = comfy.supported_models
    if kind in ("sd1", "sd2"):
        config = models.SD15({**UNET, "context_dim": 20, "use_linear_in_transformer": False, "adm_in_channels": None})
        config.unet_config |= {"num_heads": 2, "num_head_channels": -1}
        if kind == "sd2":
            config.model_type = lambda state_dict, prefix="": comfy.model_base.ModelType.V_PREDICTION
        return Tiny(_patcher(config, dtype), 4, 20)
    if kind == "sdxl":
        unet = {**UNET, "context_dim": 20, "use_linear_in_transformer": True, "adm_in_channels": 1280 + 1536}
        config = models.SDXL({**unet, "num_classes": "sequential"})
        config.unet_config |= {"num_heads": -1, "num_head_channels": 16}
        return Tiny(_patcher(config, dtype), 4, 20, pooled=1280)
    if kind == "sd3":
        return Tiny(_patcher(models.SD3(SD3), dtype), 16, 20, pooled=24)
    return Tiny(_patcher(models.Flux(FLUX), dtype), 16, 20, pooled=24, guidance=3.5)


KINDS = ("sd1", "sd2", "sdxl", "sd3", "flux")
