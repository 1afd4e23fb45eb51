"""Trains the demo's base model on Noto emoji: the autoencoder first, then UNet and text encoder together.

python scripts/pretrain_demo_base.py EMOJI_PACKAGE_DIR OUT_DIR --vae-minutes 16 --unet-minutes 71

EMOJI_PACKAGE_DIR holds npm's emoji-datasource-google 16, unpacked. OUT_DIR/pipeline is the model, in diffusers' layout;
where it stands, training goes on from it. OUT_DIR/samples.png is what it draws. lorasmith must be installed.

N pictures in all, B in a batch; pictures [N,3,64,64] in [-1, 1], latents [N,4,16,16], token ids [N,L] with L = 32.
Training is measured in minutes, so that its length is known beforehand; on another machine it takes other steps.
"""

# pyright: reportPrivateImportUsage=false
# diffusers imports its names when they are asked for, which pyright takes for private.

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import noto
import numpy as np
import torch
import torch.nn.functional as F
from demo_base_model import (
    DemoBase,
    decoded,
    encoded_text,
    loaded_model,
    new_model,
    new_tokenizer,
    pipeline,
    posterior,
    predicted,
    save,
    saved_before,
    token_ids,
)
from diffusers import AutoencoderKL
from PIL import Image
from timed_training import batches, follow, reported, timed_steps
from torch import Generator, Tensor, nn

from lorasmith.devices import compute_dtype
from lorasmith.diffusion.process import Diffusion

VAE_BATCH, VAE_PEAK_LR = 16, 1e-3
UNET_BATCH, UNET_PEAK_LR = 64, 6e-4
KL_WEIGHT = 1.6e-3  # per latent element
EMPTY_CAPTIONS = 0.1  # so that the model can be guided (Ho and Salimans 2022)
MAX_SNR = 5.0  # min-SNR-5 (Hang et al. 2023)
SECONDS_BETWEEN_SAVES = 600
PROMPTS = [
    *["red apple", "grinning face", "dog face", "automobile", "rocket", "sunflower", "slice of pizza", "shortcake"],
    *["cat face", "house building", "guitar", "octopus", "green heart", "soccer ball", "umbrella", "palm tree"],
]


def moved(pictures: Tensor, generator: Generator) -> Tensor:
    """pictures [B,3,64,64] -> the same, all mirrored in half of the cases, all shifted by up to 3 pixels in half."""
    mirrored, shifted = (torch.rand(2, generator=generator) < 0.5).tolist()
    if mirrored:
        pictures = pictures.flip(3)
    if shifted:
        pictures = pictures.roll(torch.randint(-3, 4, (2,), generator=generator).tolist(), (2, 3))
    return pictures


def slope_error(a: Tensor, b: Tensor) -> Tensor:
    """a, b [B,3,64,64] -> the mean absolute difference of their slopes, down and across, which keeps edges sharp."""
    return F.l1_loss(a.diff(dim=2), b.diff(dim=2)) + F.l1_loss(a.diff(dim=3), b.diff(dim=3))


def vae_loss(vae: AutoencoderKL, pictures: Tensor, generator: Generator, dtype: torch.dtype) -> Tensor:
    """pictures [B,3,64,64] -> the loss of their reconstruction, and of latents that stray from a normal law."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        law = posterior(vae, pictures)
        drawn = decoded(vae, law.sample(generator))
    kl = law.kl().mean() / law.mean[0].numel()
    return F.l1_loss(drawn, pictures) + 0.5 * slope_error(drawn, pictures) + KL_WEIGHT * kl


def trained_vae(vae: AutoencoderKL, pictures: Tensor, minutes: float, generator: Generator) -> AutoencoderKL:
    """The autoencoder trained and averaged, its scaling factor set so that scaled latents have a deviation of 1."""
    dtype = compute_dtype("bf16", torch.device("cpu"))
    order = batches(len(pictures), VAE_BATCH, generator)
    average = copy.deepcopy(vae)

    def loss() -> Tensor:
        return vae_loss(vae, moved(pictures[next(order)], generator), generator, dtype)

    steps = timed_steps(list(vae.parameters()), loss, minutes=minutes, peak_lr=VAE_PEAK_LR)
    for step in reported("autoencoder", steps):
        follow(average.parameters(), vae.parameters(), step)
    average.register_to_config(scaling_factor=1 / latents(average, pictures).std().item())
    return average


@torch.no_grad()
def latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """pictures [N,3,64,64] -> the means of their latents [N,4,16,16], not scaled."""
    return torch.cat([posterior(vae, some).mean for some in pictures.split(64)])


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, pictures: Tensor) -> float:
    """pictures [N,3,64,64] -> mean absolute error of the autoencoder, where black to white is 2."""
    drawn = [decoded(vae, posterior(vae, some).mean) for some in pictures.split(64)]
    return F.l1_loss(torch.cat(drawn), pictures).item()


def stratified(size: int, generator: Generator) -> Tensor:
    """Numbers [size] in [0, 1), one in each of `size` equal parts, in random order, so that a batch sees all noises."""
    parts = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    return parts[torch.randperm(size, generator=generator)]


def unet_loss(
    model: DemoBase, process: Diffusion, x0: Tensor, ids: Tensor, *, generator: Generator, dtype: torch.dtype
) -> Tensor:
    """x0 [B,4,16,16], ids [B,L] -> the error of the predicted noise, weighted min(snr, 5) / snr (Hang et al. 2023)."""
    t = process.time(stratified(len(x0), generator))
    eps = torch.randn(x0.shape, generator=generator)
    x_t = process.noise(x0, eps, t)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        pred = predicted(model, x_t, t, encoded_text(model, ids))
    snr = process.snr(t)
    return (F.mse_loss(pred, eps, reduction="none").mean((1, 2, 3)) * snr.clamp(max=MAX_SNR) / snr).mean()


def some_emptied(ids: Tensor, empty: Tensor, generator: Generator) -> Tensor:
    """ids [B,L], empty [1,L] -> ids with a tenth of the captions replaced by the empty one."""
    return torch.where(torch.rand(len(ids), 1, generator=generator) < EMPTY_CAPTIONS, empty, ids)


def unet_weights(model: DemoBase) -> list[nn.Parameter]:
    """What the second half of the training trains."""
    return [*model.unet.parameters(), *model.text_encoder.parameters()]


def trained_unets(
    model: DemoBase, pictures: Tensor, captions: list[str], minutes: float, generator: Generator
) -> Iterator[DemoBase]:
    """The model with UNet and text encoder trained and averaged: every ten minutes, and at the end."""
    dtype = compute_dtype("bf16", torch.device("cpu"))
    process = Diffusion(pipeline(model).scheduler.alphas_cumprod, "eps")
    x0 = latents(model.vae, pictures) * model.vae.config["scaling_factor"]
    ids, empty = token_ids(model.tokenizer, captions), token_ids(model.tokenizer, [""])
    order = batches(len(x0), UNET_BATCH, generator)
    average = replace(model, unet=copy.deepcopy(model.unet), text_encoder=copy.deepcopy(model.text_encoder))

    def loss() -> Tensor:
        chosen = next(order)
        shown = some_emptied(ids[chosen], empty, generator)
        return unet_loss(model, process, x0[chosen], shown, generator=generator, dtype=dtype)

    last_save = 0.0
    steps = timed_steps(unet_weights(model), loss, minutes=minutes, peak_lr=UNET_PEAK_LR)
    for step in reported("UNet and text encoder", steps):
        follow(unet_weights(average), unet_weights(model), step)
        if step.seconds - last_save > SECONDS_BETWEEN_SAVES:
            last_save = step.seconds
            yield average
    yield average


def write_samples(model: DemoBase, path: Path) -> None:
    """Draws the prompts with 25 steps and guidance 3, side by side in rows of eight, twice their size."""
    options: dict[str, Any] = {"height": noto.SIDE, "width": noto.SIDE, "output_type": "np", "return_dict": False}
    generator = Generator().manual_seed(0)
    drawn = pipeline(model)(PROMPTS, num_inference_steps=25, guidance_scale=3.0, generator=generator, **options)[0]
    grid = np.asarray(drawn).reshape(-1, 8, noto.SIDE, noto.SIDE, 3)  # rows, columns, height, width, RGB in [0, 1]
    rows = grid.transpose(0, 2, 1, 3, 4).reshape(-1, 8 * noto.SIDE, 3)
    sheet = Image.fromarray((rows * 255).round().astype(np.uint8))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path, optimize=True)


def publish(model: DemoBase, out: Path) -> None:
    save(model, out / "pipeline")
    write_samples(model, out / "samples.png")


def picture_tensor(emojis: list[noto.Emoji]) -> Tensor:
    """Their pictures [N,3,64,64], float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(noto.picture(emoji)) for emoji in emojis])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the demo's base model on Noto emoji.")
    parser.add_argument("package", type=Path, help="npm's emoji-datasource-google 16, unpacked")
    parser.add_argument("out", type=Path, help="the folder to write pipeline/ and samples.png to")
    parser.add_argument("--from", dest="start", type=Path, help="a model to go on from where out has no pipeline yet")
    parser.add_argument("--vae-minutes", type=float, help="default: 16, or 0 (keep it) where training goes on")
    parser.add_argument("--unet-minutes", type=float, default=71.0, help="for UNet and text encoder, default: 71")
    parser.add_argument("--seed", type=int, default=0, help="of first weights, order and noise, default: 0")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    emojis = noto.training_emojis(args.package)
    pictures, captions = picture_tensor(emojis), [emoji.caption for emoji in emojis]
    start = saved_before(args.out / "pipeline") or args.start
    model = loaded_model(start) if start else new_model(new_tokenizer(captions), args.seed)
    print(f"{len(emojis)} pictures; from {start or 'scratch'}", flush=True)
    generator = Generator().manual_seed(args.seed)
    vae_minutes = args.vae_minutes if args.vae_minutes is not None else (0.0 if start else 16.0)
    if vae_minutes > 0:
        model = replace(model, vae=trained_vae(model.vae, pictures, vae_minutes, generator))
        save(model, args.out / "pipeline")
    print(f"reconstruction error {reconstruction_error(model.vae, pictures):.4f}", flush=True)
    for trained in trained_unets(model, pictures, captions, args.unet_minutes, generator):
        publish(trained, args.out)


if __name__ == "__main__":
    main()
