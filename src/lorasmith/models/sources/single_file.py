"""The parts of a pipeline whose denoiser is in one safetensors file, the others there or in a diffusers folder."""

import importlib
import inspect
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorasmith.models.checkpoints.ldm import below, ldm_vae
from lorasmith.models.checkpoints.ldm_configs import vae_config
from lorasmith.models.checkpoints.load import warn_of_others
from lorasmith.models.checkpoints.original import Original
from lorasmith.models.checkpoints.transformer_configs import Config
from lorasmith.models.sources.components import NEEDS_CHECKER, FolderComponents
from lorasmith.storage.json_files import json_table
from lorasmith.storage.safetensors_header import Header

log = logging.getLogger(__name__)

DENOISER, VAES = "model.diffusion_model.", ("first_stage_model.", "vae.")
TEXTS = ("conditioner.", "text_encoders.", "cond_stage_model.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
OF_TRAINING = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights", "denoiser.",
    "global_step", "embedding_manager.", "v_pred", "ztsnr", "edm_", "logvar",
)  # fmt: skip


@dataclass(frozen=True)
class FileComponents:
    """A single file, and a folder that holds what the file does not."""

    header: Header
    original: Original
    pipeline_name: str  # its class in diffusers
    folder: FolderComponents | None = None

    @property
    def scheduler(self) -> Mapping[str, Any]:
        return self.original.scheduler(self.header, self.folder.scheduler if self.folder else None)

    def config(self, name: str) -> Any:
        return self.folder.config(name) if self.folder else None

    def net(self, name: str) -> Any:
        """The denoiser; ValueError where the pipeline has two, as no file says which of them it is."""
        if name != self.original.part:
            raise ValueError(
                f"{self.header.path} holds one denoiser, but the pipeline of encoders has {name} too: "
                f"give the whole folder as model"
            )
        keys = self.keys()
        net = self.original.net(self.header, keys, self.part_config(name))
        self._tell_of_the_rest(set(keys.values()))
        return net

    def pipeline(self, nets: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> Any:
        parts = {**nets, **self._own(dtype)}
        if self.folder is not None:
            pipe = self.folder.pipeline(parts, dtype)
            pipe.scheduler = type(pipe.scheduler).from_config(dict(self.scheduler))
            return pipe
        diffusers = importlib.import_module("diffusers")
        kind = getattr(diffusers, self.pipeline_name)
        arguments = inspect.signature(kind.__init__).parameters
        needed = [name for name, argument in arguments.items() if argument.default is argument.empty and name != "self"]
        parts["scheduler"] = getattr(diffusers, self.original.scheduler_kind).from_config(dict(self.scheduler))
        if NEEDS_CHECKER in arguments:
            parts[NEEDS_CHECKER] = False
        return kind(**{**dict.fromkeys(needed), **parts})

    def lacking(self, names: Sequence[str]) -> str:
        return (
            f"{self.header.path} must hold {' and '.join(names)} to encode captions, or encoders be a folder that does"
        )

    def keys(self) -> dict[str, str]:
        """The denoiser's tensors: {name: key in the file}."""
        if self.header.holds(DENOISER):
            return below(self.header, DENOISER)
        return {key: key for key in self.header.shapes if not key.startswith((*VAES, *TEXTS, *OF_TRAINING))}

    def part_config(self, name: str) -> Config:
        """Of a part, from the folder; empty where there is none."""
        path = self.folder.path / name / "config.json" if self.folder else None
        values = json_table(path) if path and path.is_file() else {}
        return {key: value for key, value in values.items() if not key.startswith("_")}

    def _tell_of_the_rest(self, read: set[str]) -> None:
        """Logs what is not read, with a warning where it is of no known part."""
        rest = [key for key in self.header.shapes if key not in read and not key.startswith(VAES)]
        if self.original.holds_encoders(self.header):
            rest = [key for key in rest if not key.startswith(TEXTS)]
        strange = [key for key in rest if not key.startswith((*TEXTS, *OF_TRAINING))]
        warn_of_others(str(self.header.path), strange)
        if rest:
            counts = Counter(key.partition(".")[0] for key in rest)
            what = ", ".join(f"{name} ({count})" for name, count in counts.items())
            log.info("not read of %s: %s", self.header.path.name, what)

    def _own(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """What the file holds besides the denoiser, in this dtype (None: as stored)."""
        parts = self.original.encoders(self.header, dtype)
        prefix = next((prefix for prefix in VAES if self.header.holds(prefix)), None)
        vae = self._vae(prefix, dtype) if prefix else None
        return parts if vae is None else {**parts, "vae": vae}

    def _vae(self, prefix: str, dtype: torch.dtype | None) -> Any:
        """The file's; None where it is no AutoencoderKL, so that the folder's has to do."""
        kind = "AutoencoderKL" if self.original.vae is not None else None
        if self.folder is not None and self.folder.has("vae"):
            kind = self.folder.index["vae"][1]
        if kind != "AutoencoderKL":
            log.info("not read of %s: its VAE, which is no AutoencoderKL", self.header.path.name)
            return None
        shown = vae_config(self.header, prefix)
        del shown["scaling_factor"]
        config = {**(self.original.vae or {}), **self.part_config("vae"), **shown}
        return ldm_vae(self.header, below(self.header, prefix), config, dtype)
