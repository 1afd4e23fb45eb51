"""What may be published of a file's metadata: known keys, with values made of numbers and of known technical words.

Everything else is left out, so that no spelling of a path or a name has to be foreseen.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from lorasmith.storage.safetensors_header import PEFT_CONFIG

KEYS = frozenset(
    f"{prefix}{key}"
    for prefix, keys in {
        "": "format alpha rank r lora_alpha network_alpha network_dim scale step steps epoch",
        "modelspec.": (
            "sai_model_spec architecture implementation resolution prediction_type encoder_layer timestep_range"
            " is_negative_embedding"
        ),
        "lorasmith.": "version algorithm steps samples config dora_scale file_layout expert net",
        "ss_": (
            "network_module network_dim network_alpha network_dropout network_args learning_rate unet_lr"
            " text_encoder_lr lr_scheduler lr_warmup_steps optimizer loss_type seed epoch num_epochs steps"
            " max_train_steps num_train_images num_reg_images num_batches_per_epoch batch_size_per_device"
            " total_batch_size gradient_accumulation_steps gradient_checkpointing mixed_precision full_fp16 full_bf16"
            " fp8_base max_grad_norm base_model_version v2 clip_skip max_token_length resolution enable_bucket"
            " bucket_no_upscale min_bucket_reso max_bucket_reso cache_latents color_aug flip_aug random_crop"
            " face_crop_aug_range shuffle_caption keep_tokens caption_dropout_rate caption_dropout_every_n_epochs"
            " caption_tag_dropout_rate lowram noise_offset multires_noise_iterations multires_noise_discount"
            " adaptive_noise_scale ip_noise_gamma zero_terminal_snr min_snr_gamma debiased_estimation"
            " prior_loss_weight scale_weight_norms huber_schedule huber_c huber_scale weighting_scheme logit_mean"
            " logit_std mode_scale guidance_scale timestep_sampling sigmoid_scale model_prediction_type"
            " discrete_flow_shift apply_t5_attn_mask t5xxl_max_token_length"
        ),
    }.items()
    for key in keys.split()
)
HASHES = frozenset(
    "sshs_model_hash sshs_legacy_hash ss_sd_model_hash ss_new_sd_model_hash ss_vae_hash ss_new_vae_hash"
    " ss_sd_scripts_commit_hash modelspec.hash_sha256 lorasmith.base_hash".split()
)
FIELDS = frozenset(
    # Of ss_network_args, by kohya's tools and LyCORIS
    "algo preset conv_dim conv_alpha dropout rank_dropout module_dropout factor decompose_both use_tucker use_scalar"
    " unbalanced_factorization use_cp use_conv_cp disable_conv_cp dora_wd wd_on_output weight_decompose bypass_mode"
    " rs_lora full_matrix constraint rescaled block_size train_norm loraplus_lr_ratio loraplus_unet_lr_ratio"
    " loraplus_text_encoder_lr_ratio block_dims block_alphas conv_block_dims conv_block_alphas down_lr_weight"
    " mid_lr_weight up_lr_weight block_lr_zero_threshold train_t5xxl train_blocks split_qkv ggpo_sigma ggpo_beta"
    # Of PEFT's configurations
    " peft_type task_type r lora_alpha alpha lora_dropout bias fan_in_fan_out inference_mode use_rslora use_dora"
    " use_qalora qalora_group_size lora_bias init_lora_weights init_weights rank_pattern alpha_pattern target_modules"
    " exclude_modules modules_to_save layers_to_transform layers_pattern target_parameters layer_replication"
    " decompose_factor rank_dropout_scale coft eps oft_block_size num_oft_blocks block_share use_cayley_neumann"
    # Of our own
    " adapter targets text_encoder optimizer schedule loss times data name rank enabled preset train"
    " learning_rate weight_decay betas beta momentum nesterov centered warmup final delta mean std steps batch_size"
    " grad_accumulation_steps max_grad_norm training_dtype lora_dtype gradient_checkpointing checkpoint_depth"
    " quantized_backward base_dtype native_kernels pack sharded loss_space seed resolution caption_lines".split()
)
"""The keys of JSON inside values."""
WORDS = frozenset(
    # Of values in general
    "none null true false inf nan dynamic fp bf float bfloat int bit pt no"
    # Of layers and algorithms
    " lora loha lokr locon oft boft ia glora dylora full diag tlora lycoris networks kohya adapter attn mlp only unet"
    " transformer convblock te text encoder linear conv default gaussian pissa olora causal lm feature extraction paper"
    " comfyui diffusers high low noise"
    # Of optimizers, schedules and losses
    " torch optim optimizer optimizers bitsandbytes adam adamw adamax sgd rmsprop lion prodigy prodigyopt adafactor"
    " dadaptation dadaptadam dadaptadan dadaptadagrad dadaptlion dadaptsgd transformers optimization came paged"
    " schedulefree adamwschedulefree radamschedulefree sgdschedulefree automagic weight decay betas eps momentum"
    " nesterov d coef growth rate decouple use bias correction safeguard warmup scale parameter relative step amsgrad"
    " constant with cosine restarts polynomial annealing piecewise exponential mse mae smooth huber snr uniform logit"
    " normal sigmoid shift sigma sqrt cosmap mode lognormal epsilon sample flow velocity raw additive native join first"
    # Of models
    " stable diffusion sd sdxl xl base refiner turbo cascade pony illustrious medium large dev schnell klein flux"
    " kontext fill krea chroma wan vace qwen image edit layered z zimage hunyuan hunyuanvideo video dit framepack ltx"
    " ltxv cogvideox mochi pixart alpha sana lumina hidream auraflow cosmos kolors inpaint inpainting".split()
)
"""What the words of values may be, in lower case."""
PLAIN = re.compile(r"[A-Za-z0-9_ .,:=+/()\[\]{}'\"-]{,300}")
PATTERN = re.compile(r"[A-Za-z0-9_ .,|*+?^$()\[\]{}\\-]{,300}")
CLASS = re.compile(r"\[([^\]]*)\]")
ESCAPE = re.compile(r"\\[dwsb.]")
NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?:\d{1,20}(?:\.\d{1,20})?(?:[eE][+-]?\d{1,3})?|\d{1,5}x\d{1,5})(?![A-Za-z0-9])", re.ASCII
)
TOKEN = re.compile(r"[A-Za-z0-9]+")
PART = re.compile(r"[a-z]+|[0-9]+")
HASH = re.compile(r"(?:0x)?(?:[0-9a-f]{8}|[0-9a-f]{40}|[0-9a-f]{64})", re.IGNORECASE)
TELLING = re.compile(
    r"//|\.\.|^[\s\"'(\[{]*/|(?<![A-Za-z])[A-Za-z]:"  # paths
    r"|\d+\.\d+\.\d+\.\d+|\d:\d|\d{4}-\d|(?<![A-Za-z\d])\+\d|\d/\d"  # addresses, times, telephone numbers
)
"""Signs of a path, an address or a time, whatever its words are."""
LONG = re.compile(r"(?<![\d.])\d{10}")
"""A whole number that may be a time or a telephone number."""
SEED = "ss_seed"
SCALING = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""What PEFT's configuration says of the scale of layers."""


def harmless(metadata: Mapping[str, str], tensors: Collection[str] = ()) -> dict[str, str]:
    """What may be published of it; tensors: the names in the file, whose words a PEFT configuration may hold.

    ValueError where the scale of the LoRA would be lost.
    """
    kept = {key: _published(key, value) for key, value in metadata.items()}
    if PEFT_CONFIG in metadata:
        kept[PEFT_CONFIG] = _peft_configuration(
            metadata[PEFT_CONFIG], frozenset(PART.findall(" ".join(tensors).lower()))
        )
    return {key: value for key, value in kept.items() if value is not None}


def _published(key: str, value: str) -> str | None:
    """The value, or what may stay of it; None where nothing may."""
    if key in HASHES:
        return value if _is_hash(value) else None
    if key not in KEYS:
        return None
    if not value.lstrip().startswith("{"):
        return value if _is_plain(value) and (key == SEED or not LONG.search(value)) else None
    try:
        kept = _reduced(json.loads(value), frozenset())
    except (ValueError, RecursionError):
        return None
    return json.dumps(kept) if kept else None  # anew, as JSON may name a key twice


def _peft_configuration(text: str, layers: frozenset[str]) -> str:
    """What may stay of it; ValueError where that is less than what scales the layers."""
    try:
        found = json.loads(text)
        kept = _reduced(found, layers)
    except (ValueError, RecursionError):
        found = kept = None
    if not isinstance(found, dict) or not isinstance(kept, dict):
        raise ValueError(
            f"{PEFT_CONFIG} must be a JSON object, as it scales the LoRA: it can neither be kept nor left out"
        )
    for key in found:
        if _is_key(key, layers) and key.rpartition(".")[2] in SCALING and kept.get(key) != found[key]:
            raise ValueError(f"{PEFT_CONFIG}: {key} must be made of numbers and layers' names, as it scales the LoRA")
    return json.dumps(kept)


def _reduced(value: Any, layers: frozenset[str]) -> Any:
    """Of JSON what is known: numbers, known words and names of layers, under known keys; None where nothing is."""
    if isinstance(value, dict):
        items = {key: _reduced(inner, layers) for key, inner in value.items() if _is_key(key, layers)}
        return {key: inner for key, inner in items.items() if inner is not None or value[key] is None}
    if isinstance(value, list):
        items = [_reduced(inner, layers) for inner in value]
        return [inner for inner in items if inner is not None]
    if isinstance(value, str):
        is_harmless = _is_plain(value) and not LONG.search(value)
        return value if is_harmless or _names_layers(value, layers) else None
    return value


def _is_key(key: str, layers: frozenset[str]) -> bool:
    """A known key, of a net where one is named before it, or a layer."""
    net, _, field = key.rpartition(".")
    return (field in FIELDS and (not net or _names_layers(net, layers))) or _names_layers(key, layers)


def _is_hash(text: str) -> bool:
    """Whether it is one by its length and digits, and no text in hexadecimal."""
    if not HASH.fullmatch(text):
        return False
    try:
        bytes.fromhex(text.lower().removeprefix("0x")).decode()
    except UnicodeDecodeError:  # as good as certain for a hash
        return True
    return False


def _is_plain(text: str) -> bool:
    """Whether it is made of numbers and known words."""
    return PLAIN.fullmatch(text) is not None and not TELLING.search(text) and _knows(text, WORDS)


def _names_layers(text: str, layers: frozenset[str]) -> bool:
    """Whether it is made of words of layers' names: one of them, or a regular expression over them."""
    letters = CLASS.sub(lambda match: f" {' '.join(match[1])} ", ESCAPE.sub(" ", text))
    return bool(text and layers) and PATTERN.fullmatch(text) is not None and _knows(letters, layers)


def _knows(text: str, words: Collection[str]) -> bool:
    """Whether all its words are of these; `t2v` and `v1` may be any, but no more letters between digits than that."""
    for token in TOKEN.findall(NUMBER.sub(" ", text)):
        parts = PART.findall(token.lower())
        are_free = 1 < len(parts) < 4
        if not all(
            part in words or (len(part) < 5 if part.isdigit() else len(part) == 1 and are_free) for part in parts
        ):
            return False
    return True
