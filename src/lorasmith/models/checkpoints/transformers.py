"""How single files hold transformers: in the layout of the original code, or under diffusers' names.

The conversion is diffusers' own; where that knows one width alone, the family splits what depends on the width.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.models.checkpoints.clip import shaped_encoders
from lorasmith.models.checkpoints.load import UNFIT, dtype_in, fitted, line, shaped, tensors
from lorasmith.models.checkpoints.transformer_configs import Config, Shapes
from lorasmith.storage.safetensors_header import Header

State = dict[str, Tensor]
Convert = Callable[[State], State]


def _plain(state: State, convert: Convert) -> State:
    return convert(state)


@dataclass(frozen=True)
class OriginalTransformer:
    """A family's transformer in single files."""

    kind: str  # its class in diffusers
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


CLIP_L, CLIP_G, T5_XXL = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
"""How the names of text encoders' tensors begin in such files."""
