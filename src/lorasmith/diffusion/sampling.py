"""Image generation: deterministic steps from noise to x0, the same for every process.

B batch, C channels, h w latent height and width.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lorasmith.data.buckets import num_at_once
from lorasmith.data.dataset import stacked
from lorasmith.devices import device_of
from lorasmith.reporting.progress import Advance, unwatched
from lorasmith.rng import Purpose, normal
from lorasmith.types import Codec, Cond, Denoiser, Encoding, Guided, SizeCodec, process_of


def drawn(
    denoiser: Denoiser, cond: Cond, uncond: Cond, noise: Tensor, *, steps: int, guidance: float,
    advance: Advance = unwatched,
) -> Tensor:  # fmt: skip
    """noise [B,C,h,w], cond and uncond {name: [B,…]} -> x0 [B,C,h,w], float32.

    Each step goes from the implied x0 and eps to the next timestep (DDIM with eta 0, Song et al. 2021, eq. 12; for a
    flow: Euler's method). Timesteps are evenly spaced and start at the noisiest (Lin et al. 2024, section 3.3);
    guidance as in Ho and Salimans 2021, eq. 6, with weight guidance - 1, unless it is an input of the net. The net
    predicts with both conditionings in one batch of 2 B. advance: called with B after each step.
    """
    if isinstance(denoiser, Encoding):  # once, not at each step
        cond, uncond, denoiser = denoiser.encoded(cond), denoiser.encoded(uncond), denoiser.inner
    process = process_of(denoiser, noise.shape[1:])
    if isinstance(denoiser, Guided):
        cond, guidance = denoiser.guided(cond, guidance), 1.0
    is_guided = guidance != 1
    if is_guided:
        cond = stacked([*_rows(cond), *_rows(uncond)])
    fractions = 1 - torch.arange(steps, dtype=torch.float64) / steps - 1e-6
    times = process.time(fractions)
    times = times.float() if times.is_floating_point() else times
    x_t = noise
    for step in range(steps):
        t = times[step].expand(len(x_t)).to(x_t.device)
        if is_guided:
            out, without = denoiser.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), cond).chunk(2)
            out = without + guidance * (out - without)
        else:
            out = denoiser.predict(x_t, t, cond)
        x0, eps = process.x0(x_t, out, t), process.eps(x_t, out, t)
        last = step == steps - 1
        x_t = x0 if last else process.noise(x0, eps, times[step + 1].expand(len(x_t)).to(x_t.device))
        advance(len(x_t))
    return x_t


def pictures_of(
    denoiser: Denoiser, codec: Codec, prompts: Mapping[int, str], *, size: tuple[int, int], seed: int, steps: int,
    guidance: float, advance: Advance = unwatched,
) -> Iterator[Tensor]:  # fmt: skip
    """An image [3,H,W] in -1 to 1 of size (W, H) for each {number: prompt}, with noise from (seed, number).

    Images are batched as far as memory surely allows. advance: called for each step of each image, and for each decoded
    image.
    """
    device, shape = device_of(denoiser), codec.latent_shape(size)
    conds = {text: _cond(codec, text, size) for text in ("", *prompts.values())}
    numbers = list(prompts)
    at_once = max(1, num_at_once(shape) // 2)  # with and without their prompt
    for start in range(0, len(numbers), at_once):
        chosen = numbers[start : start + at_once]
        cond, uncond = (
            {name: value.to(device) for name, value in stacked([conds[text] for text in texts]).items()}
            for texts in ([prompts[number] for number in chosen], [""] * len(chosen))
        )
        with torch.inference_mode():
            noise = torch.stack([normal(seed, Purpose.PICTURE, number, shape) for number in chosen])
            latents = drawn(denoiser, cond, uncond, noise.to(device), steps=steps, guidance=guidance, advance=advance)
        for latent in latents:
            with torch.inference_mode():
                pixels = codec.decode(latent[None])[0].clamp(-1, 1).cpu()
            advance(1)
            yield pixels


def _cond(codec: Codec, text: str, size: tuple[int, int]) -> Cond:
    """The conditioning of a text at this image size: {name: [L,D] or [D]}."""
    with torch.inference_mode():
        cond = {name: value[0] for name, value in codec.encode_texts([text]).items()}
    return cond | codec.encode_size(size, (0, 0), size) if isinstance(codec, SizeCodec) else cond


def _rows(cond: Cond) -> list[Cond]:
    """{name: [B,…]} -> B times {name: […]}."""
    return [dict(zip(cond, row, strict=True)) for row in zip(*cond.values(), strict=True)]
