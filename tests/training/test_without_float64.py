"""Apple's GPUs: nothing that a run computes there has float64, or needs an operator that torch lacks there.

The processor stands in for the device: a tensor is on the host once it was moved there by `cpu()`, or made without
naming a device, and everything else that an operator touches is on the device.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torchgen
import yaml
from tiers import table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import OFT, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.config.schema import Config
from lorasmith.data.dataset import Dataset
from lorasmith.diffusion.process import Diffusion
from lorasmith.diffusion.sampling import drawn
from lorasmith.diffusion.validation import held_out_losses
from lorasmith.optim.master_weights import norm
from lorasmith.optim.optimizers import OptimizerName
from lorasmith.prepare.share import shared_copy
from lorasmith.training.loop import train
from lorasmith.training.state import State
from lorasmith.types import Cached

LACKING = (torch.float64, torch.complex128)
CPU = torch.device("cpu")
STAND_IN = "_scaled_dot_product_flash_attention_for_cpu"
"""What `scaled_dot_product_attention`, which Apple's GPUs have, chooses on the processor alone, and its gradient."""


@cache
def kernels() -> dict[str, Any]:
    """torch's own table of its operators, and which devices each has a kernel for."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return {entry["func"].split("(")[0]: entry for entry in entries}


def is_on_apple(name: str) -> bool:
    """Whether an operator ("add.Tensor") has a kernel for Apple's GPUs, or is composed of others."""
    entry = kernels().get(name)
    if entry is None:  # a variant made of another one, which copies
        return any(name in found.get("autogen", "").split(", ") for found in kernels().values())
    if "structured_delegate" in entry:
        return is_on_apple(entry["structured_delegate"])
    keys = {key.strip() for keys in entry.get("dispatch", {"Composite": ""}) for key in keys.split(",")}
    return "MPS" in keys or any(key.startswith("Composite") for key in keys)


class Lacking(Exception):
    """The device has no such numbers, or no such operator."""


class Operators(TorchDispatchMode):
    """Refuses operators on the device that touch what it lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.host: Any = WeakIdKeyDictionary()
        self.num_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten.lift_fresh.default or all(
            tensor in self.host for tensor in inputs
        ):  # new tensors are for `Moves` to tell apart
            for tensor in outputs if inputs else ():
                self.host[tensor] = True
            return out
        self.num_seen += 1
        name = func.name().removeprefix("aten::")
        if not (name.startswith(STAND_IN) or is_on_apple(name)):
            raise Lacking(f"{func} is not there on the device")
        if odd := {tensor.dtype for tensor in (*inputs, *outputs)} & set(LACKING):
            raise Lacking(f"{func} of {odd.pop()} on the device")
        return out


class Moves(TorchFunctionMode):
    """Tells the operators which tensors are moved to the host, and which to the device."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.host = operators.host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = [
            leaf for leaf in (*args[1:], *(kwargs or {}).values()) if leaf == "cpu" or isinstance(leaf, torch.device)
        ]
        if func is Tensor.cpu or (func is Tensor.to and places == ["cpu"]):
            out = out.view_as(out)  # another object, as a copy on another device would be
            self.host[out] = True
        elif isinstance(out, Tensor) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            if places and out.dtype in LACKING:
                raise Lacking(f"a new tensor of {out.dtype} on the device")
            if places:
                self.host.pop(out, None)
            else:
                self.host[out] = True
        elif func is Tensor.to and places:
            if out.dtype in LACKING:
                raise Lacking(f"{out.dtype} is moved to the device")
            out = out.view_as(out)
            self.host.pop(out, None)
        return out


@pytest.fixture
def operators() -> Any:
    operators = Operators()
    with operators, Moves(operators):
        yield operators


def test_what_the_device_lacks_is_noticed(operators: Operators) -> None:
    vector = torch.ones(5, device=CPU)
    assert float(vector.cpu().double().norm()) == pytest.approx(5**0.5)
    wrong: dict[str, Callable[[], Any]] = {
        "a number that is widened": lambda: vector.double().norm(),
        "a new tensor": lambda: torch.zeros(3, device=CPU, dtype=torch.float64),
        "one that is moved there": lambda: torch.arange(3, dtype=torch.float64).to(CPU),
        "a sum with one of the host": lambda: vector + torch.ones(5, dtype=torch.float64),
    }
    for faulty in wrong.values():
        with pytest.raises(Lacking, match="float64"):
            faulty()
    for operator in (torch.linalg.svd, torch.linalg.eigh, torch.geqrf):
        with pytest.raises(Lacking, match="aten.* is not there on the device"):
            operator(torch.ones(3, 3, device=CPU))
    assert torch.linalg.solve(torch.eye(3, device=CPU), torch.ones(3, device=CPU)).tolist() == [1] * 3


def test_the_length_of_a_vector(operators: Operators) -> None:
    assert norm(torch.ones(10_000, device=CPU)) == pytest.approx(100)
    assert operators.num_seen


def samples(number: float = 1.0) -> list[Cached]:
    generator = torch.Generator().manual_seed(0)
    return [
        Cached(
            f"s{i}", number * torch.randn(4, 8, 8, generator=generator),
            {"text": torch.randn(5, 16, generator=generator), "pooled": torch.randn(8, generator=generator)},
        )
        for i in range(2)
    ]  # fmt: skip


def run(
    denoiser: Any, dtype: torch.dtype, held: list[Cached], earlier: State | None = None, **values: Any
) -> tuple[Any, AdapterSet, State]:
    """Two steps, or those that an earlier run has not done."""
    config = Config.model_validate(
        {"steps": 2, "batch_size": 2, "native_kernels": False, "targets": {"preset": "attention"}, **values}
    )
    copy = shared_copy(denoiser, CPU, dtype)
    adapters = AdapterSet.new(copy, config.adapter, config.targets, 0).to(CPU, torch.float32)
    state = State(adapters, config, is_fp16=dtype == torch.float16)
    dataset = Dataset.of(held, [1] * len(held), seed=0, group_size=config.group_size)
    if earlier is not None:
        state.load(earlier.tensors(), earlier.numbers())
    with attached(copy, adapters):
        num_steps = len(list(train(copy, adapters, dataset, config, state=state)))
    assert config.steps is not None and num_steps == config.steps - (earlier is not None)
    return copy, adapters, state


VALUES: list[dict[str, Any]] = [
    *({"optimizer": name} for name in ("AdamW", "Adam", "SGD", "RMSprop")),
    *({"loss": name} for name in ("L1", "Huber", "SmoothL1")),
    *({"adapter": kind(rank=2)} for kind in (LoRA, LoHa, LoKr, OFT, DoRA)), {"adapter": OFT(rank=4, alpha=0.01)},
    {"times": {"name": "logit_normal"}}, {"schedule": {"name": "cosine", "warmup": 1}}, {"loss_space": "x0"},
    {"grad_accumulation_steps": 2, "batch_size": 1, "gradient_checkpointing": False},
]  # fmt: skip


@table("values", VALUES, quick=VALUES[::4], ids=str)
def test_training(flow_denoiser: Any, operators: Operators, values: dict[str, Any]) -> None:
    run(flow_denoiser, torch.float32, samples(), **values)
    assert operators.num_seen > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_16_bits(flow_denoiser: Any, operators: Operators, dtype: torch.dtype) -> None:
    run(flow_denoiser, dtype, samples())
    assert operators.num_seen > 100


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_diffusion(flow_denoiser: Any, operators: Operators, prediction: Any) -> None:
    process = Diffusion(torch.linspace(0.999, 0.01, 1000, device="cpu"), prediction)
    copy, adapters, _ = run(dataclasses.replace(flow_denoiser, process=process), torch.float32, samples())
    measured_and_drawn(copy, adapters)


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_resuming(flow_denoiser: Any, operators: Operators, optimizer: str) -> None:
    _, _, first = run(flow_denoiser, torch.float32, samples(), optimizer=optimizer, steps=1)
    _, adapters, both = run(flow_denoiser, torch.float32, samples(), first, optimizer=optimizer)
    assert both.counters.step == 2 and all(
        tensor.isfinite().all() for tensor in adapters.file_state(flow_denoiser, torch.bfloat16).values()
    )


def test_where_numbers_stop_being_finite(
    flow_denoiser: Any, operators: Operators, caplog: pytest.LogCaptureFixture
) -> None:
    held = [samples()[0], samples(float("inf"))[1]]
    with pytest.raises(ArithmeticError, match="not finite"):
        run(flow_denoiser, torch.float32, held, non_finite={"limit": 1})


def measured_and_drawn(copy: Any, adapters: AdapterSet) -> None:
    with attached(copy, adapters):
        assert held_out_losses(copy, samples()).isfinite().all()
        cond = {name: value[None].to(CPU) for name, value in samples()[0].cond.items()}
        noise = samples()[0].latent[None].to(CPU)
        assert drawn(copy, cond, cond, noise, steps=2, guidance=2.0).isfinite().all()


def test_measuring_and_drawing(flow_denoiser: Any, operators: Operators) -> None:
    measured_and_drawn(*run(flow_denoiser, torch.float32, samples())[:2])
