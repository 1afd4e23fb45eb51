"""The UNet and the data that step_time.py trains on, what a step computes, and what the machine can compute.

B batch, N samples, h w latent height and width, L tokens, D width.
"""

import statistics
import time
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from step_time_work import Work, main_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lorasmith.devices import DTYPES
from lorasmith.formats.unet_names import ldm_names
from lorasmith.models.checkpoints.ldm_configs import BETAS, UNET

SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768},  # diffusers' defaults are Stable Diffusion 1.5's otherwise
    "small": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}
NUM_TOKENS = 77
NUM_SAMPLES = 4
CHECKED_T = 400
SIDES = {"sd15": 4096, "small": 1024}  # of the matrices whose product is the peak
REPEATS = 7


def net_of(size: str) -> UNet2DConditionModel:
    """With diffusers' own random weights."""
    return UNet2DConditionModel(sample_size=64, attention_head_dim=8, **SIZES[size])


def made(work: Work) -> dict[str, Any]:
    """Writes the UNet in the layout of the original code, which all can read, and the data; the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = net_of(work.size)
    ldm, dtype = ldm_names(net.config), DTYPES[work.dtype]
    state: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        path, _, part = key.rpartition(".")
        state[f"{UNET}{ldm[path]}.{part}"] = value.to(dtype).contiguous()
    save_file(state, work.model_path)
    save_file(_data(work, SIZES[work.size]["cross_attention_dim"]), work.data_path)
    names = ("lorasmith", "diffusers", "peft", "lycoris_lora")
    weights = sum(value.numel() for value in state.values())
    return {"weights": weights, "flops": flops(work), "versions": {name: version(name) for name in names}}


def _data(work: Work, width: int) -> dict[str, Tensor]:
    """latents [N,4,h,w] and text [N,L,D], and a fixed noised latent: x_t, eps [1,4,h,w], t, sigma [1]."""
    generator, side = torch.Generator().manual_seed(1), work.resolution // 8
    num = max(NUM_SAMPLES, work.batch)
    latents = torch.randn(num, 4, side, side, generator=generator)
    text = torch.randn(num, NUM_TOKENS, width, generator=generator)
    eps, t = torch.randn(1, 4, side, side, generator=generator), torch.tensor([CHECKED_T])
    scheduler = DDPMScheduler(**BETAS)
    a = scheduler.alphas_cumprod[t]
    x_t = scheduler.add_noise(latents[:1], eps, t)  # pyright: ignore[reportArgumentType]
    return {"latents": latents, "text": text, "x_t": x_t, "eps": eps, "t": t, "sigma": ((1 - a) / a).sqrt()}


def flops(work: Work) -> int:
    """What a step of the plain net computes: forward and the gradient of its input, whose weights are frozen."""
    side = work.resolution // 8
    with torch.device("meta"):
        net = net_of(work.size).requires_grad_(False)
        x_t = torch.randn(work.batch, 4, side, side, requires_grad=True)
        t = torch.zeros(work.batch, dtype=torch.long)
        text = torch.randn(work.batch, NUM_TOKENS, net.config["cross_attention_dim"])
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        net(x_t, t, text).sample.sum().backward()
    return counter.get_total_flops()


def peak_flops(work: Work) -> dict[str, Any]:
    """The median rate of a product of two big matrices, in FLOP/s."""
    side, dtype = SIDES[work.size], DTYPES[work.dtype]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(dtype) for _ in range(2))
    torch.mm(a, b)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return {"peak_flops": 2 * side**3 / statistics.median(seconds)}


if __name__ == "__main__":
    main_of(lambda work: {"make": made, "peak": peak_flops}[work.what](work))
