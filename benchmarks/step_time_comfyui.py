"""ComfyUI's own Train LoRA node, as step_time.py has it train; runs under the Python of the checkout in COMFYUI_PATH.

N samples, h w latent height and width, L tokens, D width.
"""

import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from step_time_work import LEARNING_RATE, LeftOut, Work, answer, main_of
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

OF_A_WEIGHT = re.compile(r"(.+?)\.(alpha|rescale|lora_|lokr_|hada_|oft_).*")  # others are offsets of biases and norms
OWN = "own_dtype"  # the one option that is no input of the node


def begin(work: Work, base: str) -> None:
    """Imports ComfyUI without a GPU, with the weights kept in the work's dtype as its switches offer."""
    switches = [] if work.flag(OWN) else [f"--{work.dtype}-unet"]
    sys.argv = ["main.py", "--cpu", "--base-directory", base, *switches]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.options").enable_args_parsing()
    for folder in ("input", "output", "models/loras"):
        Path(base, folder).mkdir(parents=True)
    for name in ("comfy.sd", "comfy.supported_models", "comfy_extras.nodes_train"):
        importlib.import_module(name)


def loaded(work: Work) -> Any:
    """A ModelPatcher of the file."""
    if work.size == "sd15":
        return importlib.import_module("comfy.sd").load_diffusion_model(str(work.model_path))
    return narrow(str(work.model_path))


def narrow(path: str, disable_dynamic: bool = False) -> Any:
    """A ModelPatcher of a net narrower than SD 1.5, which ComfyUI's loader does not know, from ComfyUI's own parts.

    It says how it was made, as the node makes it anew; `disable_dynamic` is what ComfyUI asks for then.
    """
    prefix, state = "model.diffusion_model.", load_file(path)
    detected = importlib.import_module("comfy.model_detection").detect_unet_config(state, prefix)
    config = importlib.import_module("comfy.supported_models").SD15(detected)
    config.set_inference_dtype(next(iter(state.values())).dtype, None)
    model, cpu = config.get_model(state, prefix), torch.device("cpu")
    model.load_model_weights(state, prefix)
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher(model, cpu, cpu)
    patcher.cached_patcher_init = (narrow, (path,))
    return patcher


class TrainNode:
    """The node with its own defaults but for what all contenders share; options are further inputs of it."""

    def __init__(self, patcher: Any, work: Work) -> None:
        self.module: Any = importlib.import_module("comfy_extras.nodes_train")
        if work.algorithm not in self.module.adapter_maps:
            raise LeftOut(f"ComfyUI has no {work.algorithm}")
        self.patcher, self.work = patcher, work
        self.lora: dict[str, Tensor] = {}

    def _run(self, patcher: Any, steps: int) -> None:
        """Every input is a list, as ComfyUI hands them over."""
        work, data = self.work, load_file(self.work.data_path)
        schema = self.module.TrainLoraNode.define_schema()
        names = [declared.id for declared in schema.inputs]
        inputs = {declared.id: declared.as_dict().get("default") for declared in schema.inputs}
        inputs |= {
            "model": patcher, "latents": {"samples": data["latents"]},
            "positive": [[text[None], {}] for text in data["text"]],
            "batch_size": work.batch, "steps": steps, "rank": work.rank, "algorithm": work.algorithm,
            "learning_rate": LEARNING_RATE, "training_dtype": work.dtype, "lora_dtype": work.dtype,
        }  # fmt: skip
        for name, value in work.options.items():
            if name != OWN and name not in names:
                raise ValueError(f"an option of comfyui must be {OWN} or one of {', '.join(names)}, got {name}")
            if name != OWN:
                inputs[name] = json.loads(value)
        found = self.module.TrainLoraNode.execute(**{name: [value] for name, value in inputs.items()})
        self.lora = found.result[0]

    def layers_and_numbers(self) -> tuple[int, int]:
        """Alphas, which are constants, do not count."""
        layers = {match[1] for key in self.lora if (match := OF_A_WEIGHT.fullmatch(key))}
        return len(layers), sum(v.numel() for key, v in self.lora.items() if not key.endswith(".alpha"))

    def prediction(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Of the node's first step, whose noised latent is exchanged for this one on the way into the net.

        ComfyUI's latents are x0 + sigma eps, and its net's output comes as x0 (Karras et al. 2022).
        """
        sigma = load_file(self.work.data_path)["sigma"]
        x = x_t * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
        seen: list[Tensor] = []

        def exchanged(apply_model: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
            context = {**given["c"], "c_crossattn": text.to(given["c"]["c_crossattn"])}
            x0 = apply_model(x.to(given["input"]), sigma.to(given["timestep"]), **context)
            seen.append((x - x0.detach().float()) / sigma)
            return x0.expand_as(given["input"])

        patcher = self.patcher.clone()
        patcher.set_model_unet_function_wrapper(exchanged)
        self._run(patcher, 1)
        return seen[0]

    def train(self, on_step: Callable[[], None]) -> None:
        handle = register_optimizer_step_post_hook(lambda *_: on_step())
        try:
            self._run(self.patcher, self.work.steps)
        finally:
            handle.remove()


def answers(work: Work) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as base:
        begin(work, base)
        found = answer(work, lambda: loaded(work), lambda patcher: TrainNode(patcher, work))
    return found | {"versions": {"ComfyUI": importlib.import_module("comfyui_version").__version__}}


if __name__ == "__main__":
    main_of(answers)
