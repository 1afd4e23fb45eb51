"""What is known of a family's denoiser in single files, whatever it is."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from lorasmith.models.checkpoints.transformer_configs import Config
from lorasmith.storage.safetensors_header import Header


class Original(Protocol):
    """How single files hold a family's denoiser, and what they hold beside it."""

    @property
    def part(self) -> str:
        """The name of the denoiser in its pipelines."""
        ...

    @property
    def scheduler_kind(self) -> str:
        """The class in diffusers of the scheduler of a pipeline that is made of a file alone."""
        ...

    @property
    def vae(self) -> Config | None:
        """The values of an AutoencoderKL's config that no shape shows; None: it is of another class."""
        ...

    def net(self, header: Header, keys: Mapping[str, str], base: Config) -> nn.Module:
        """The denoiser with the tensors {name: key in the file}, in the dtype that they are stored in.

        base: a config whose values hold where no shape says otherwise. ValueError where a tensor is missing or has no
        place, or where it is another kind of model.
        """
        ...

    def shaped(self, header: Header, keys: Mapping[str, str], base: Config) -> Any:
        """The same without weights, on the meta device: no tensor is read."""
        ...

    def scheduler(self, header: Header, base: Config | None) -> Config:
        """The scheduler's config: what the file states, then the base's, then as published."""
        ...

    def holds_encoders(self, header: Header) -> bool:
        """Whether the file holds text encoders that are read."""
        ...

    def encoders(self, header: Header, dtype: torch.dtype | None) -> dict[str, Any]:
        """The text encoders and tokenizers that the file holds; dtype None: as they are stored."""
        ...

    def shaped_encoders(self, header: Header) -> dict[str, Any]:
        """The text encoders that the file holds, without weights, on the meta device."""
        ...
