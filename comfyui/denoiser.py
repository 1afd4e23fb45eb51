"""A model of ComfyUI as lorasmith sees it: its noise process, its raw prediction, its layers' names.

B batch, C channels, h w latent sides.
"""

import copy
import dis
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorasmith.devices import in_double
from lorasmith.prepare.activation_checkpointing import INNERMOST, blocks
from lorasmith.types import Cond

NET = "diffusion_model"
ALONE = ("area", "mask", "control", "gligen", "timestep_start", "timestep_end", "default")
"""What makes a sample's conditioning run by itself: parts of the picture or of the times, or other networks."""
INPLACE = 13  # from here on, the operations of BINARY_OP are `+=` and its kind (Python 3.11 to 3.14)
COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SamplingProcess:
    """A model's `model_sampling` as a process; t [B] is its sigma.

    All of them are linear in x0, eps and the network's output: what they make of ones and zeros tells the factors.
    """

    sampling: Any

    def time(self, fraction: Tensor) -> Tensor:
        """fraction [B] in [0, 1), 0 the cleanest -> sigma [B]; the ends, where ComfyUI has no target, are left out."""
        percents = (1 - in_double(fraction)).clamp(2**-24, 1 - 2**-24)
        return torch.tensor([float(self.sampling.percent_to_sigma(percent)) for percent in percents.tolist()])

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.sampling.noise_scaling(t.to(x0.device), eps, x0)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The output that x0 follows from; in float64, as x_t - x0 is nothing else than rounding at low noise."""
        of_input, of_output = self._of_denoised(t, x0)
        wide = in_double(x0)
        x_t = self.noise(wide, in_double(eps), in_double(t))
        return ((wide - of_input * x_t) / of_output).to(x0)

    def x0(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        of_input, of_output = (factor.to(x_t) for factor in self._of_denoised(t, x_t))
        return of_input * x_t + of_output * out

    def eps(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        of_x0, of_eps = self._of_noised(t, x_t)
        wide = in_double(x_t)
        return ((wide - of_x0 * self.x0(wide, in_double(out), t)) / of_eps).to(x_t)

    def snr(self, t: Tensor) -> Tensor:
        of_x0, of_eps = self._of_noised(t, t)
        return (of_x0 / of_eps).square().to(t)

    def _of_denoised(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of x_t and of the output in x0, float64 [B,1,…]."""
        sigma, one = _along(t, like)
        return (
            self.sampling.calculate_denoised(sigma, 0 * one, one),
            self.sampling.calculate_denoised(sigma, one, 0 * one),
        )

    def _of_noised(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of x0 and of eps in x_t, float64 [B,1,…]."""
        sigma, one = _along(t, like)
        return self.sampling.noise_scaling(sigma, 0 * one, one), self.sampling.noise_scaling(sigma, one, 0 * one)


def _along(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """t [B] and ones [B,1,…] with as many axes as `like` [B,…], in float64 on the processor."""
    return in_double(t), torch.ones(len(t), *[1] * (like.ndim - 1), dtype=torch.float64)


class ComfyDenoiser:
    """A model of ComfyUI, and the conditioning of each sample, which a batch names by its number ("entry" [B,1]).

    Copies of it, which training works on, return the network's raw output and cast nothing on the way.
    """

    def __init__(self, model: Any, entries: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        """model: a BaseModel; entries: what `conditioning.prepared` makes; options: the patcher's model_options."""
        self.model, self.entries, self.options = model, entries, options
        self.process = SamplingProcess(model.model_sampling)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ComfyDenoiser":
        plain = copy.copy(self.model)
        plain.current_patcher = None  # which holds the original, and copies of its weights
        for shared in (plain.model_config, plain.latent_format):  # nothing in them changes
            memo[id(shared)] = shared
        model = copy.deepcopy(plain, memo)
        model.model_sampling = copy.copy(model.model_sampling)
        model.model_sampling.calculate_denoised = _raw_output
        parameter = next(p for p in model.diffusion_model.parameters() if p.is_floating_point())
        if parameter.dtype in COMPUTED:  # else its weights are cast when they are used, to what it asks for
            model.manual_cast_dtype = parameter.dtype
        _open_sequences(model.diffusion_model)
        _make_plain(model.diffusion_model)
        _keep_activations(model.diffusion_model)
        patcher = comfy.model_patcher.ModelPatcher(model, parameter.device, parameter.device)
        model.current_patcher = patcher
        twin = ComfyDenoiser(model, self.entries, self.options)
        twin.process = self.process
        return twin

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {NET: self.model.diffusion_model}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B,C,h,w], t [B], cond {"entry": [B,1]} -> the network's output [B,C,h,w], float32."""
        entries = [self.entries[int(number)] for number in cond["entry"][:, 0].tolist()]
        outputs: dict[int, Tensor] = {}
        for group in self._groups(entries):
            chosen = [entries[place] for place in group]
            outputs |= zip(group, self._output(x_t[group], t[group], chosen), strict=True)
        return torch.stack([outputs[place] for place in range(len(entries))]).float()

    def _groups(self, entries: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The places of entries that can run as one batch."""
        groups: list[list[int]] = []
        for place, entry in enumerate(entries):
            found = next((group for group in groups if self._fit(entries[group[0]], entry)), None)
            groups.append([place]) if found is None else found.append(place)
        return groups

    def _fit(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        is_plain = not any(self._is_alone(entry) for entry in (one, other))
        return is_plain and comfy.samplers.cond_equal_size(one["model_conds"], other["model_conds"])

    def _is_alone(self, entry: Mapping[str, Any]) -> bool:
        return "model_function_wrapper" in self.options or any(key in entry for key in ALONE)

    def _output(self, x_t: Tensor, t: Tensor, entries: Sequence[Mapping[str, Any]]) -> Tensor:
        """Each sample with its own conditioning, in one call of the model."""
        if self._is_alone(entries[0]):
            entry = dict(entries[0])
            if "control" in entry:
                entry["control"] = _Still(entry["control"])
            return comfy.samplers.calc_cond_batch(self.model, [[entry]], x_t, t, dict(self.options))[0]
        conds = [
            {key: value.process_cond(batch_size=1, area=None) for key, value in entry["model_conds"].items()}
            for entry in entries
        ]
        options = dict(self.options.get("transformer_options", {}))
        options |= {"cond_or_uncond": [0], "uuids": [entry["uuid"] for entry in entries], "sigmas": t}
        together = {
            key: value.to(x_t.device) if isinstance(value, Tensor) else value
            for key, value in comfy.samplers.cond_cat(conds).items()
        }
        return self.model.apply_model(x_t, t, transformer_options=options, **together)

    def file_key(self, path: str) -> str:
        """diffusion_model.input_blocks.1…: ComfyUI's own names."""
        return path

    def aliases(self) -> dict[str, str]:
        """All the names that ComfyUI knows for a whole layer, as it reads LoRA files."""
        known = comfy.lora.model_lora_keys_unet(self.model, {})
        return {
            name: key.removesuffix(".weight")
            for name, key in known.items()
            if isinstance(key, str) and key.startswith(f"{NET}.") and key.endswith(".weight")
        }


class _Still:
    """A ControlNet without gradients: it is not trained, and its weights may be of inference mode."""

    def __init__(self, control: Any) -> None:
        self.control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.control.get_control(*args, **kwargs)


def _raw_output(sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
    """In the place of `calculate_denoised`."""
    return model_output


class OutOfPlace(TorchFunctionMode):
    """The statement `x += y` makes a new x: networks made for inference write over what a backward pass needs.

    A call of `x.add_(y)`, which nothing takes the result of, stays as it is.
    """

    PLAIN = {Tensor.add_: torch.add, Tensor.sub_: torch.sub, Tensor.mul_: torch.mul, Tensor.div_: torch.div}

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = self.PLAIN.get(func)
        needs_grad = plain is not None and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if plain is not None and needs_grad and _is_statement(sys._getframe(1)):
            return plain(*args).to(args[0].dtype)
        return func(*args, **(kwargs or {}))

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Runs it in this mode, which is open but once, where gradients are asked for."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.is_open or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self.is_open = True
            try:
                with self:
                    return forward(*args, **kwargs)
            finally:
                self.is_open = False

        return run


def _is_statement(frame: FrameType) -> bool:
    """Whether what this frame runs is `x += y` or one of its kind."""
    opcode, argument = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
    return opcode == dis.opmap["BINARY_OP"] and argument >= INPLACE


def _open_sequences(net: nn.Module) -> None:
    """Makes lists of what ComfyUI's UNets run layer by layer, past the forward pass of the sequence that holds them.

    So each of the layers is a block that can be checkpointed, where the sequence never runs.
    """
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TimestepEmbedSequential):
                module.register_module(name, nn.ModuleList(cast(nn.Sequential, child)))


def _make_plain(net: nn.Module) -> None:
    """Makes torch's own layers of ComfyUI's that neither cast nor patch their weights.

    They compute the same; what packs them, keeps weights in few bits, or takes gradients as int8 products, looks for
    torch's own. A layer that a LoRA was set beside (bypass) keeps the forward pass of ComfyUI's class as its own.
    """
    ops = comfy.ops.disable_weight_init
    plain: dict[type[nn.Module], type[nn.Module]] = {ops.Linear: nn.Linear, ops.Conv2d: nn.Conv2d}
    for module in net.modules():
        if type(module) in plain and "forward" not in vars(module):
            if not (module.comfy_cast_weights or module.weight_function or module.bias_function):
                module.__class__ = plain[type(module)]


def _keep_activations(net: nn.Module) -> None:
    """Blocks by themselves too, as those that are checkpointed run again outside the net."""
    mode = OutOfPlace()
    for module in dict.fromkeys([net, *(block for depth in range(1, INNERMOST + 1) for block in blocks(net, depth))]):
        module.forward = mode.around(module.forward)
