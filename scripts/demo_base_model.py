"""The demo's base model, a Stable Diffusion pipeline in miniature: its vocabulary, its networks, its folder.

Pictures are [B,3,64,64] in [-1, 1], latents [B,4,16,16], captions [B,L] with L = 32 tokens, their encoding [B,L,192].
"""

# pyright: reportPrivateImportUsage=false
# diffusers imports its names when they are asked for, which pyright takes for private.

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY_SIZE = 2048
NUM_TOKENS = 32
TEXT_WIDTH = 192
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# Words of styles and colours that few captions have, so that a LoRA's trigger words are not cut into letters.
EXTRA_WORDS = (
    "flat style line art sketch pixel watercolor painting photo sks style a an of the emoji picture drawing black "
    "white red green blue yellow orange purple pink brown gray noto twemoji openmoji"
)

VAE: dict[str, Any] = {  # 1.6 M parameters
    "sample_size": 64,
    "latent_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
}
TEXT_ENCODER: dict[str, Any] = {  # 2.2 M parameters
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": NUM_TOKENS,
    "projection_dim": TEXT_WIDTH,
    "bos_token_id": 0,  # START and END are the vocabulary's first two
    "eos_token_id": 1,
    "pad_token_id": 1,
}
UNET: dict[str, Any] = {  # 8.7 M parameters
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 160),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
}

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class DemoBase:
    """The parts that are trained, and the tokenizer; nothing in them depends on train or eval mode."""

    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel


def new_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A tokenizer that cuts text as CLIP's does, with a byte-pair vocabulary learnt from the captions."""
    rules, texts = CLIPTokenizer().backend_tokenizer, [*captions, *[EXTRA_WORDS] * 3]
    learner = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix=WORD_END, continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[START, END, *word_ends(learner, texts)],
        end_of_word_suffix=WORD_END,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=NUM_TOKENS)


def word_ends(cutter: Tokenizer, texts: list[str]) -> list[str]:
    """The letters that words end with, sorted: left to itself, the trainer numbers them in another order every time."""
    cut = (cutter.pre_tokenizer.pre_tokenize_str(cutter.normalizer.normalize_str(text)) for text in texts)
    return sorted({word[-1] + WORD_END for words in cut for word, _ in words})


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """captions -> [len(captions), L], int64, padded or cut to L."""
    encoded = tokenizer(captions, padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def new_scheduler() -> DDIMScheduler:
    """Noise prediction over 1,000 steps with Stable Diffusion's betas."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def new_model(tokenizer: CLIPTokenizer, seed: int) -> DemoBase:
    """Untrained networks, float32, in the memory layout that convolutions on a processor prefer."""
    with torch.random.fork_rng(devices=[]):  # the layers draw their first weights from the global generator
        torch.manual_seed(seed)
        vae, text_encoder = AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
        unet = UNet2DConditionModel(**UNET)
    for net in (vae, unet):
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return DemoBase(tokenizer=tokenizer, vae=vae, text_encoder=text_encoder, unet=unet)


def loaded_model(folder: Path) -> DemoBase:
    """The model saved in `folder`, float32; torch refuses another architecture and names its weights."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"the model to go on from must be a diffusers folder: there is no {folder / 'model_index.json'}"
        )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = new_model(tokenizer, seed=0)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    model.vae.load_state_dict(vae.state_dict())
    model.vae.register_to_config(scaling_factor=vae.config["scaling_factor"])
    model.text_encoder.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
    model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    return model


def posterior(vae: AutoencoderKL, pictures: Tensor) -> DiagonalGaussianDistribution:
    """pictures [B,3,64,64] -> the law of their latents [B,4,16,16], not scaled."""
    return vae.encode(pictures.contiguous(memory_format=torch.channels_last), return_dict=False)[0]


def decoded(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """latents z [B,4,16,16], not scaled -> pictures [B,3,64,64], float32."""
    return vae.decode(z, return_dict=False)[0].float()  # pyright: ignore[reportArgumentType]


def encoded_text(model: DemoBase, ids: Tensor) -> Tensor:
    """ids [B,L] -> [B,L,192]."""
    return model.text_encoder(ids).last_hidden_state


def predicted(model: DemoBase, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """noised latents x_t [B,4,16,16], t [B], text [B,L,192] -> predicted noise [B,4,16,16], float32."""
    x_t = x_t.contiguous(memory_format=torch.channels_last)
    return model.unet(x_t, t, text, return_dict=False)[0].float()


def pipeline(model: DemoBase) -> StableDiffusionPipeline:
    """diffusers' pipeline around the model's own networks."""
    parts: dict[str, Any] = {
        "vae": model.vae,
        "text_encoder": model.text_encoder,
        "tokenizer": model.tokenizer,
        "unet": model.unet,
        "scheduler": new_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def half(net: Net) -> Net:
    """A copy in half precision."""
    return copy.deepcopy(net).half()


def former(folder: Path) -> Path:
    """Where `replaced` keeps the folder that it is about to replace."""
    return folder.with_name(folder.name + ".old")


def saved_before(folder: Path) -> Path | None:
    """The folder saved last: the former one if a crash came between the two renames, None if there is none."""
    return next((path for path in (folder, former(folder)) if path.exists()), None)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; when the block ends well it takes the place of `folder`, otherwise it goes."""
    filling = folder.with_name(folder.name + ".new")
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir(parents=True)
    try:
        yield filling
    except BaseException:
        shutil.rmtree(filling)
        raise
    if folder.exists():
        shutil.rmtree(former(folder), ignore_errors=True)
        folder.rename(former(folder))
    filling.rename(folder)
    shutil.rmtree(former(folder), ignore_errors=True)


def save(model: DemoBase, folder: Path) -> None:
    """Writes a diffusers folder in half precision, safetensors; a crash leaves no half-written one there."""
    halved = replace(model, vae=half(model.vae), text_encoder=half(model.text_encoder), unet=half(model.unet))
    with replaced(folder) as filling:
        pipeline(halved).save_pretrained(filling, safe_serialization=True)
