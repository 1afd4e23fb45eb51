"""What holds for single families that are pipelines, on tiny ones: parts that may be missing, encodings, masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline
from tiny import PROMPTS, made

from lorasmith.models.load import load_model

CPU = torch.device("cpu")


def test_sd3_without_t5_reads_zeros_and_what_clip_cuts_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pipe = made("StableDiffusion3Pipeline")
    whole = load_model(pipe).codec(CPU).encode_texts(PROMPTS[:1])
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    cond = load_model(pipe).codec(CPU).encode_texts([PROMPTS[0], "a" * 40])
    assert torch.equal(cond["text"][0, :16], whole["text"][0, :16]) and cond["text"].shape[1:] == (16 + 256, 32)
    assert whole["text"][0, 16:].any() and not cond["text"][:, 16:].any()
    said = [record.message for record in caplog.records if record.name.startswith("lorasmith")]
    assert said == [f"only the first 16 of 42 tokens are read of '{'a' * 40}'"]


def test_sd3_without_t5_comes_from_a_folder_too(tmp_path: Path) -> None:
    pipe = made("StableDiffusion3Pipeline")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    ours, theirs = (load_model(source).codec(CPU).encode_texts(PROMPTS[:1]) for source in (tmp_path, pipe))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums depend on where weights lie in memory


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, "5-medium"), ({"dual_attention_layers": ()}, "5-large"), ({"qk_norm": None}, "m")],
)
def test_sd3s_sizes_are_told_apart(changes: dict[str, Any], name: str) -> None:
    pipe = made("StableDiffusion3Pipeline")
    pipe.transformer.register_to_config(**changes)
    assert load_model(pipe).metadata()["modelspec.architecture"] == f"stable-diffusion-3-{name}/lora"


@pytest.mark.parametrize("name", ["ChromaPipeline", "QwenImagePipeline"])
def test_texts_of_several_lengths_are_the_single_ones_and_zeros(name: str) -> None:
    codec = load_model(made(name)).codec(CPU)
    together = codec.encode_texts(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        single = {key: value[0] for key, value in codec.encode_texts([prompt]).items()}
        length = len(single["mask"])
        assert single["mask"].all()
        torch.testing.assert_close({key: value[row, :length] for key, value in together.items()}, single)
        assert not any(value[row, length:].any() for value in together.values())


@pytest.mark.parametrize(("name", "length"), [("ChromaPipeline", 8), ("QwenImagePipeline", 3 + 6)])
def test_what_is_read_of_a_caption(name: str, length: int) -> None:
    """Chroma: 5 letters and spaces, what T5 puts around them, one of padding. Qwen: a, space and c, a, t; the end."""
    cond = load_model(made(name)).codec(CPU).encode_texts(["a cat"])
    assert cond["text"].shape[:2] == cond["mask"].shape == (1, length)


@pytest.mark.parametrize("name", ["ChromaPipeline", "QwenImagePipeline"])
def test_padding_is_not_read_and_a_mask_of_another_length_is_refused(name: str) -> None:
    family = load_model(made(name))
    cond = family.codec(CPU).encode_texts(PROMPTS[:1])
    x_t, t = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    length = cond["mask"].shape[1]
    padded = {
        "text": torch.cat([cond["text"], torch.ones_like(cond["text"])], dim=1),
        "mask": torch.cat([cond["mask"], torch.zeros_like(cond["mask"])], dim=1),
    }
    with torch.no_grad():
        pred, text = family.denoiser.predict(x_t, t, cond), {"text": cond["text"]}
        torch.testing.assert_close(family.denoiser.predict(x_t, t, padded), pred)
        assert torch.equal(family.denoiser.predict(x_t, t, text), pred)  # all tokens are read without a mask
    with pytest.raises(ValueError, match=rf"a mask as long as text, \[{length}\], got \[{length - 1}\]"):
        family.denoiser.predict(x_t, t, cond | {"mask": cond["mask"][:, 1:]})


def test_qwens_latents_are_those_of_diffusers() -> None:
    pipe = made("QwenImagePipeline")
    with torch.no_grad():  # the deviation becomes 0, so that what diffusers draws is the mean
        pipe.vae.quant_conv.weight[4:], pipe.vae.quant_conv.bias[4:] = 0.0, -40.0
    images = torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = QwenImageImg2ImgPipeline(**pipe.components)
    with torch.no_grad():
        theirs = reference._encode_vae_image(images[:, :, None], torch.Generator())
        ours = load_model(pipe).codec(CPU).encode_images(images)
    torch.testing.assert_close(ours, theirs[:, :, 0], atol=1e-5, rtol=1e-5)
