"""Pictures drawn with a denoiser: deterministic steps from noise to x0, for every process alike.

B batch, C channels, h w latent height and width.
"""

import torch
from torch import Tensor

from lorasmith.devices import device_of
from lorasmith.draws import Purpose, normal
from lorasmith.types import Codec, Cond, Denoiser, Guided, SizeCodec, process_of


def drawn(denoiser: Denoiser, cond: Cond, uncond: Cond, noise: Tensor, *, steps: int, guidance: float) -> Tensor:
    """noise [B,C,h,w], cond and uncond {name: [B,…]} -> x0 [B,C,h,w], float32.

    Each step goes from the x0 and eps that the net implies to the next time (DDIM with eta 0, Song et al. 2021, eq. 12;
    for a flow: Euler's method). Times are evenly spaced and start at the noisiest (Lin et al. 2024, section 3.3);
    guidance as in Ho and Salimans 2021, eq. 6, with weight guidance - 1, unless the net itself is told it.
    """
    process = process_of(denoiser, noise.shape[1:])
    if isinstance(denoiser, Guided):
        cond, guidance = denoiser.guided(cond, guidance), 1.0
    fractions = 1 - torch.arange(steps, dtype=torch.float64) / steps - 1e-6
    times = process.time(fractions)
    times = times.float() if times.is_floating_point() else times
    x_t = noise
    for step in range(steps):
        t = times[step].expand(len(x_t)).to(x_t.device)
        out = denoiser.predict(x_t, t, cond)
        if guidance != 1:
            without = denoiser.predict(x_t, t, uncond)
            out = without + guidance * (out - without)
        x0, eps = process.x0(x_t, out, t), process.eps(x_t, out, t)
        last = step == steps - 1
        x_t = x0 if last else process.noise(x0, eps, times[step + 1].expand(len(x_t)).to(x_t.device))
    return x_t


def picture_of(
    denoiser: Denoiser, codec: Codec, prompt: str, *, size: tuple[int, int], seed: int, number: int, steps: int,
    guidance: float,
) -> Tensor:  # fmt: skip
    """A picture [3,H,W] in -1 to 1 of size (W, H), its noise drawn from (seed, number)."""
    with torch.inference_mode():
        noise = normal(seed, Purpose.PICTURE, number, codec.latent_shape(size))[None]
        device = device_of(denoiser)
        cond, uncond = (
            {name: value.to(device) for name, value in codec.encode_texts([text]).items()} for text in (prompt, "")
        )
        if isinstance(codec, SizeCodec):
            size_cond = {name: value.to(device)[None] for name, value in codec.encode_size(size, (0, 0), size).items()}
            cond, uncond = cond | size_cond, uncond | size_cond
        x0 = drawn(denoiser, cond, uncond, noise.to(device), steps=steps, guidance=guidance)
        return codec.decode(x0)[0].clamp(-1, 1).cpu()
