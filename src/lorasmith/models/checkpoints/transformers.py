"""How single files hold the transformers of each family: in the layout of the original code, or under diffusers' names.

The conversion is diffusers' own; where that knows one width alone, what depends on the width is split here.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.formats.detect import UNETS
from lorasmith.models.checkpoints.clip import shaped_encoders
from lorasmith.models.checkpoints.load import UNFIT, dtype_in, fitted, line, shaped, tensors
from lorasmith.models.checkpoints.original import Original
from lorasmith.models.checkpoints.sd import OriginalSD
from lorasmith.models.checkpoints.sdxl import OriginalSDXL
from lorasmith.models.checkpoints.transformer_configs import (
    Config,
    Shapes,
    chroma,
    flux,
    flux2,
    lumina2,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from lorasmith.storage.safetensors_header import Header

State = dict[str, Tensor]
Convert = Callable[[State], State]
FLUX_ROWS = 7 * 3072  # of the fused layer in the only width that diffusers' conversion of Flux and Chroma knows


def _any_width(state: State, convert: Convert) -> State:
    """Flux's and Chroma's layers linear1 are queries, keys, values and the MLP's input, one below the other."""
    width = state["img_in.weight"].shape[0]
    fused = {key: tensor for key, tensor in state.items() if ".linear1." in key}
    state.update({key: torch.empty(FLUX_ROWS, 0) for key in fused})
    converted = convert(state)
    for key, tensor in fused.items():
        _, number, _, leaf = key.split(".")
        rows = [width, width, width, len(tensor) - 3 * width]
        for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), tensor.split(rows), strict=True):
            converted[f"single_transformer_blocks.{number}.{name}.{leaf}"] = part
    return converted


def _grouped(state: State, convert: Convert) -> State:
    """Lumina 2's layers qkv are queries and, of fewer heads, keys and values, one below the other."""
    width = state["x_embedder.weight"].shape[0]
    for key in [key for key in state if ".attention.qkv." in key]:
        tensor = state.pop(key)
        rows = [width, (len(tensor) - width) // 2, (len(tensor) - width) // 2]
        for name, part in zip(("to_q", "to_k", "to_v"), tensor.split(rows), strict=True):
            state[key.replace("qkv", name)] = part
    return convert(state)


def _plain(state: State, convert: Convert) -> State:
    return convert(state)


def _flux_scheduler(shapes: Shapes) -> Config:
    """Dev, which is told the guidance, shifts by size; schnell does not."""
    is_dev = any("guidance_" in key for key in shapes)
    by_size = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return {"shift": 3.0 if is_dev else 1.0, "use_dynamic_shifting": is_dev, **by_size}


@dataclass(frozen=True)
class OriginalTransformer:
    """A family's transformer in single files."""

    kind: str  # its class in diffusers
    pipelines: tuple[str, ...]  # in diffusers, that have such a transformer
    sizes: Callable[[Shapes, Config], Config]
    sign: str  # what stands in a name of the original layout alone
    convert: Callable[[State, Convert], State] = _plain
    axes: str | None = None  # the config's key for the parts of a head that are turned by each coordinate
    published: Callable[[Shapes], Config] | None = None  # the scheduler's config; None: published models differ
    vae: Config | None = None  # what no shape shows of an AutoencoderKL's config; None: it is of another class
    texts: Mapping[str, str] = field(default_factory=dict)  # {a text encoder: how its tensors' names begin}
    part: str = "transformer"
    scheduler_kind: str = "FlowMatchEulerDiscreteScheduler"

    def net(self, header: Header, keys: Mapping[str, str], base: Config) -> nn.Module:
        dtype = dtype_in(header, keys.values())
        read = tensors(header, keys.values())
        state = self._converted({name: read.pop(key) for name, key in keys.items()}, header)
        return fitted(self._class, self._config(header, state, base), state, dtype, path=header.path)

    def shaped(self, header: Header, keys: Mapping[str, str], base: Config) -> Any:
        dtype_in(header, keys.values())
        empty = {name: torch.empty(header.shapes[key], device="meta") for name, key in keys.items()}
        return shaped(self._class, self._config(header, self._converted(empty, header), base), path=header.path)

    def scheduler(self, header: Header, base: Config | None) -> Config:
        """The base's, or as published; ValueError where published models differ."""
        if base is not None:
            return base
        if self.published is None:
            raise ValueError(
                f"{header.path} does not hold its scheduler's config: encoders must be a folder that does, got none"
            )
        return self.published(header.shapes)

    def holds_encoders(self, header: Header) -> bool:
        """Those in such files are not read."""
        return False

    def encoders(self, header: Header, dtype: torch.dtype | None) -> dict[str, Any]:
        return {}

    def shaped_encoders(self, header: Header) -> dict[str, Any]:
        """Those in such files are enough to find a LoRA's layers."""
        return shaped_encoders(header, self.texts)

    @property
    def _class(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.kind)

    def _config(self, header: Header, state: State, base: Config) -> dict[str, Any]:
        """The config of a transformer with these tensors."""
        try:
            found = self.sizes({name: tuple(tensor.shape) for name, tensor in state.items()}, base)
        except UNFIT as error:
            raise ValueError(f"cannot load the {self.kind} of {header.path}: {line(error)}") from error
        config = {**base, **found}
        self._check_axes(header, self._class, config)
        return config

    def _converted(self, state: State, header: Header) -> State:
        """Under diffusers' names; what the conversion leaves keeps its own."""
        if not any(self.sign in name for name in state):
            return state
        state.pop("norm_final.weight", None)  # of Z-Image and Lumina 2: their code does not use it
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as CLASSES

        try:
            converted = self.convert(state, CLASSES[self.kind]["checkpoint_mapping_fn"])
        except IndexError as error:  # of the last of no blocks
            raise ValueError(f"cannot load the {self.kind} of {header.path}: a kind of blocks is missing") from error
        except UNFIT as error:
            raise ValueError(f"cannot load the {self.kind} of {header.path}: {line(error)}") from error
        return {**state, **converted}

    def _check_axes(self, header: Header, kind: Any, config: Config) -> None:
        if self.axes is None:
            return
        axes = config.get(self.axes, inspect.signature(kind.__init__).parameters[self.axes].default)
        width = config["dim"] // config["n_heads"] if "dim" in config else None
        head = width or config.get("attention_head_dim") or config["hidden_size"] // config["num_attention_heads"]
        if sum(axes) != head:
            raise ValueError(
                f"{self.axes} of {header.path} must add up to the width of a head, {head}, got {list(axes)}: "
                f"encoders must be a folder whose {self.part}/config.json states it"
            )


AXES = "axes_dims_rope"
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
ORIGINALS: dict[str, Original] = {
    "Stable Diffusion 1.x": OriginalSD(),
    "Stable Diffusion 2.x": OriginalSD(),
    UNETS: OriginalSD(),
    "Stable Diffusion 3": OriginalTransformer(
        "SD3Transformer2DModel", ("StableDiffusion3Pipeline",), sd3, "joint_blocks.",
        published=lambda _: {"shift": 3.0}, vae={"scaling_factor": 1.5305, "shift_factor": 0.0609},
        texts={"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
    ),
    "Flux": OriginalTransformer(
        "FluxTransformer2DModel", ("FluxPipeline",), flux, "double_blocks.", _any_width, AXES, _flux_scheduler,
        FLUX_VAE, {"text_encoder": CLIP_L, "text_encoder_2": T5},
    ),
    "Chroma": OriginalTransformer(
        "ChromaTransformer2DModel", ("ChromaPipeline",), chroma, "double_blocks.", _any_width, AXES,
        vae=FLUX_VAE,
    ),
    "Flux.2": OriginalTransformer(
        "Flux2Transformer2DModel", ("Flux2Pipeline", "Flux2KleinPipeline"), flux2, "double_blocks.", axes=AXES
    ),
    "Qwen-Image": OriginalTransformer(
        "QwenImageTransformer2DModel", ("QwenImagePipeline",), qwen_image, "\0", axes=AXES,
        published=lambda _: {
            "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
            "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
        },
    ),
    "Z-Image": OriginalTransformer(
        "ZImageTransformer2DModel", ("ZImagePipeline",), z_image, "attention.qkv.", axes="axes_dims",
        vae=FLUX_VAE,
    ),
    "Lumina 2": OriginalTransformer(
        "Lumina2Transformer2DModel", ("Lumina2Pipeline",), lumina2, "attention.qkv.", _grouped,
        "axes_dim_rope", lambda _: {"shift": 6.0}, FLUX_VAE,
    ),
    "Wan": OriginalTransformer("WanTransformer3DModel", ("WanPipeline",), wan, "head.modulation"),
    "SDXL": OriginalSDXL(),
}  # fmt: skip
"""{family, as `detect.MODEL_SIGNS` calls it: its files}."""
