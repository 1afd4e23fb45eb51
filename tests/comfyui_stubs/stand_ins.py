"""Stand-ins for what the node pack uses of ComfyUI, by what they do and not by how."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 0.5  # of latents in the model's own scale
WIDTH = 5  # of a token


class Noise:
    """Predicts eps: x_t = x0 + sigma eps."""

    sigmas = torch.linspace(0.03, 14.0, 1000)

    def percent_to_sigma(self, percent: float) -> float:
        return float(self.sigmas[round((1 - percent) * 999)])

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return latent + self._along(sigma, noise) * noise

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (self._along(sigma, x) ** 2 + 1).sqrt()

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - self._along(sigma, x) * output

    def _along(self, sigma: Tensor, like: Tensor) -> Tensor:
        return sigma.view(-1, *[1] * (like.ndim - 1))


class Velocity(Noise):
    """Predicts v = (eps - sigma x0) / sqrt(1 + sigma^2)."""

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        s = self._along(sigma, x)
        return x / (s**2 + 1) - output * s / (s**2 + 1).sqrt()


class FlowSampling(Noise):
    """Predicts eps - x0: x_t = sigma eps + (1 - sigma) x0."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1 - percent

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        s = self._along(sigma, noise)
        return s * noise + (1 - s) * latent

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x


class Net(nn.Module):
    """An attention of sorts, which writes over its input as networks for inference do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}) for _ in "ab"
        )
        self.norm = nn.LayerNorm(4)
        self.text = nn.Linear(WIDTH, 4)
        self.dtype = torch.float32

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        h = x.movedim(1, -1) + self.text(context).mean(1)[:, None, None]
        for block in self.blocks:
            y = self.norm(h)
            h += block.get_submodule("attn")(y)
        return h.movedim(-1, 1)


class Casting:
    """As ComfyUI's own layers, which can cast their weight, or patch it by functions."""

    comfy_cast_weights = False
    weight_function: Sequence[Any] = ()
    bias_function: Sequence[Any] = ()


class Linear(nn.Linear, Casting):
    """ComfyUI's linear layer."""


class Conv2d(nn.Conv2d, Casting):
    """ComfyUI's convolution of pictures."""


class Model(nn.Module):
    """As ComfyUI's BaseModel is used."""

    def __init__(self, sampling: Noise) -> None:
        super().__init__()
        self.diffusion_model = Net()
        self.model_sampling = sampling
        self.model_config = SimpleNamespace(unet_config={"model_channels": 4, "adm_in_channels": None})
        self.latent_format = SimpleNamespace(latent_channels=4)
        self.manual_cast_dtype: torch.dtype | None = None
        self.current_patcher: Any = None

    def process_latent_in(self, latent: Tensor) -> Tensor:
        return latent * torch.full((1, 4, 1, 1), SCALE)

    def apply_model(self, x: Tensor, t: Tensor, *, c_crossattn: Tensor, transformer_options: Any = None) -> Tensor:
        dtype = self.manual_cast_dtype or torch.float32
        output = self.diffusion_model(self.model_sampling.calculate_input(t, x).to(dtype), t, c_crossattn.to(dtype))
        return self.model_sampling.calculate_denoised(t, output.float(), x)


@dataclass
class Patcher:
    """As ComfyUI's ModelPatcher is used."""

    model: Any
    load_device: torch.device = torch.device("cpu")
    offload_device: torch.device = torch.device("cpu")
    model_options: dict[str, Any] = field(default_factory=lambda: {"transformer_options": {}})
    loras: list[tuple[dict[str, Tensor], float]] = field(default_factory=list)

    def model_dtype(self) -> torch.dtype:
        return torch.float32


@dataclass
class Regular:
    """As ComfyUI's CONDRegular."""

    cond: Tensor

    def process_cond(self, batch_size: int, area: Any) -> "Regular":
        return self


def entry(number: int, tokens: int = 3, **extra: Any) -> list[Any]:
    """A conditioning of its own for each number."""
    return [torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(number)), extra]


def latents(num: int, h: int = 4, w: int = 4) -> dict[str, Tensor]:
    return {"samples": torch.randn(num, 4, h, w, generator=torch.Generator().manual_seed(9))}


def _process_conds(model: Any, noise: Tensor, conds: dict[str, Any], device: Any, latent: Tensor) -> dict[str, Any]:
    for cond in conds["positive"]:
        cond["model_conds"] = {"c_crossattn": Regular(cond["cross_attn"])}
    return conds


def _calc_cond_batch(model: Any, conds: Any, x: Tensor, t: Tensor, options: Any) -> list[Tensor]:
    assert model.current_patcher is not None and len(conds) == len(conds[0]) == len(x) == 1
    return [model.apply_model(x, t, c_crossattn=conds[0][0]["model_conds"]["c_crossattn"].cond)]


def _keys(model: Any, known: dict[str, str]) -> dict[str, str]:
    for name, _ in model.diffusion_model.named_parameters():
        if name.endswith(".weight"):
            plain = name.removesuffix(".weight")
            known |= {f"{prefix}{plain}": f"diffusion_model.{name}" for prefix in ("diffusion_model.", "lora_unet_")}
            known[f"other.{plain}"] = f"diffusion_model.{name}"
    return known


def _load_lora(lora: Any, known: dict[str, str], log_missing: bool = True) -> dict[str, Any]:
    return {target: [lora.get(key) for key in lora if key.startswith(f"{name}.")] for name, target in known.items()}


def _with_lora(model: Patcher, clip: None, lora: Any, strength: float, strength_clip: float) -> tuple[Patcher, None]:
    return Patcher(model.model, loras=[*model.loras, (lora, strength)]), None


class Interrupted(BaseException):
    """As ComfyUI's InterruptProcessingException."""


class Widget:
    """An input or output as it was declared."""

    def __init__(self, id: str = "", **declared: Any) -> None:
        self.id, self.declared = id, declared


@dataclass
class NodeOutput:
    """What a node gives."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


def _kinds() -> SimpleNamespace:
    names = "Model Latent Conditioning Boolean Combo Int Float String LoraModel LossMap Image Vae Clip".split()
    kinds = {
        name: SimpleNamespace(Input=type(f"{name}Input", (Widget,), {}), Output=type(f"{name}Output", (Widget,), {}))
        for name in names
    }
    return SimpleNamespace(ComfyNode=object, Schema=SimpleNamespace, NodeOutput=NodeOutput, **kinds)


def modules() -> dict[str, ModuleType]:
    """{name: module}; a prompt is cancelled once it has told of `comfy.model_management.interrupt_at` steps."""
    management = {"in_training": False, "interrupt_at": None, "progress": [], "loaded": []}
    found = {name: ModuleType(name) for name in ("comfy", "comfy_api", "comfy_api.latest", "folder_paths")}
    parts = "model_management lora lora_convert sd model_patcher samplers sampler_helpers conds utils ops".split()
    found |= {f"comfy.{name}": ModuleType(f"comfy.{name}") for name in parts}
    nested = "comfy.ldm.modules.diffusionmodules.openaimodel"
    for depth in range(2, nested.count(".") + 2):
        found.setdefault(name := ".".join(nested.split(".")[:depth]), ModuleType(name))
    for name in parts:
        setattr(found["comfy"], name, found[f"comfy.{name}"])
    manager: Any = found["comfy.model_management"]
    vars(manager).update(management)

    def interrupted() -> bool:
        return manager.interrupt_at is not None and len(manager.progress) >= manager.interrupt_at

    def throw() -> None:
        if interrupted():
            raise Interrupted

    def progress(value: float, total: float, preview_image: Any = None) -> None:
        manager.progress.append((value, total, preview_image))

    vars(manager).update(
        processing_interrupted=interrupted, throw_exception_if_processing_interrupted=throw,
        soft_empty_cache=lambda: None, load_models_gpu=lambda models, force_full_load: manager.loaded.extend(models),
    )  # fmt: skip
    contents: dict[str, dict[str, Any]] = {
        nested: {"TimestepEmbedSequential": type("TimestepEmbedSequential", (nn.Sequential,), {})},
        "comfy.lora": {"model_lora_keys_unet": _keys, "load_lora": _load_lora},
        "comfy.lora_convert": {"convert_lora": lambda lora: lora},
        "comfy.sd": {"load_lora_for_models": _with_lora, "load_bypass_lora_for_models": _with_lora},
        "comfy.model_patcher": {"ModelPatcher": Patcher},
        "comfy.samplers": {
            "process_conds": _process_conds, "calc_cond_batch": _calc_cond_batch,
            "cond_equal_size": lambda a, b: all(a[k].cond.shape == b[k].cond.shape for k in a),
            "cond_cat": lambda conds: {key: torch.cat([cond[key].cond for cond in conds]) for key in conds[0]},
        },
        "comfy.sampler_helpers": {
            "convert_cond": lambda pairs: [{**extra, "cross_attn": text, "uuid": id(text)} for text, extra in pairs],
            "get_additional_models": lambda conds, dtype: ([], 0),
            "get_models_from_cond": lambda conds, kind: [cond[kind] for cond in conds if kind in cond],
            "cleanup_additional_models": lambda models: None,
        },
        "comfy.ops": {"disable_weight_init": SimpleNamespace(Linear=Linear, Conv2d=Conv2d)},
        "comfy.conds": {"CONDRegular": Regular},
        "comfy.utils": {"unet_to_diffusers": lambda config: {}},
        "comfy_api.latest": {
            "io": _kinds(), "ComfyExtension": object,
            "ui": SimpleNamespace(PreviewText=lambda text: text, PreviewImage=lambda image, cls=None: image),
            "ComfyAPISync": lambda: SimpleNamespace(execution=SimpleNamespace(set_progress=progress)),
        },
        "folder_paths": _folder_paths(found["folder_paths"]),
    }  # fmt: skip
    for name, values in contents.items():
        vars(found[name]).update(values)
    return found


def _folder_paths(module: Any) -> dict[str, Any]:
    def save_path(prefix: str, root: str) -> tuple[str, str, int, str, str]:
        path = Path(root, prefix)
        found = [int(match[1]) for p in path.parent.glob("*") if (match := re.search(r"_(\d{5})_\.", p.name))]
        return str(path.parent), path.name, max(found, default=0) + 1, "", prefix

    return {
        "get_output_directory": lambda: str(module.ROOT / "output"),
        "get_input_directory": lambda: str(module.ROOT / "input"),
        "get_filename_list": lambda kind: sorted(path.name for path in (module.ROOT / kind).iterdir()),
        "get_full_path_or_raise": lambda kind, name: str(module.ROOT / kind / name),
        "get_save_image_path": save_path, "ROOT": Path("/nonexistent"),
    }  # fmt: skip
