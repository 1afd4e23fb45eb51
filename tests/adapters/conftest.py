"""Layers of every kind, algorithms at the ranks where their ways part, and adapters with random weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from lorasmith.adapters.algorithms import ALGORITHMS as KINDS
from lorasmith.adapters.algorithms import OFT, Algorithm, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.base import Adapter, Layer

N_IN, N_OUT = 24, 30

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear_2_axes": (lambda: nn.Linear(N_IN, N_OUT), (3, N_IN)),
    "linear_3_axes": (lambda: nn.Linear(N_IN, N_OUT, bias=False), (2, 3, N_IN)),
    "linear_4_axes": (lambda: nn.Linear(N_IN, N_OUT), (2, 2, 3, N_IN)),
    "conv1d": (lambda: nn.Conv1d(N_IN, N_OUT, 3, stride=2, padding=1), (2, N_IN, 5)),
    "conv2d": (lambda: nn.Conv2d(N_IN, N_OUT, 3, stride=2, padding=2, dilation=(1, 2)), (2, N_IN, 5, 4)),
    "conv2d_1x1": (lambda: nn.Conv2d(N_IN, N_OUT, 1, bias=False), (2, N_IN, 3, 4)),
    "conv2d_groups": (lambda: nn.Conv2d(N_IN, N_OUT, 3, padding=1, groups=2), (2, N_IN, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(N_IN, N_OUT, (1, 3, 3), padding=(0, 1, 1)), (1, N_IN, 2, 3, 3)),
}

ALGORITHMS: dict[str, Algorithm] = {
    "LoRA_1": LoRA(rank=1),
    "LoRA_4": LoRA(rank=4, alpha=2.0),
    "LoHa_1": LoHa(rank=1),
    "LoHa_2_in_r2_columns": LoHa(rank=2, alpha=3.0),
    "LoHa_12_as_a_weight": LoHa(rank=12, alpha=5.0),
    "LoKr_2": LoKr(rank=2, alpha=3.0),
    "LoKr_2_factor_1": LoKr(rank=2, alpha=3.0, factor=1),
    "LoKr_2_factor_4": LoKr(rank=2, alpha=3.0, factor=4),
    "LoKr_16_w2_whole": LoKr(rank=16, alpha=3.0),
    "LoKr_16_w2_whole_factor_1": LoKr(rank=16, alpha=3.0, factor=1),
    "OFT_3": OFT(rank=3),
    "OFT_8_blocks_of_5": OFT(rank=8),
    "OFT_3_limited": OFT(rank=3, alpha=0.01),
    "DoRA_1": DoRA(rank=1),
    "DoRA_4": DoRA(rank=4, alpha=2.0),
}
for _kind in KINDS:
    if not any(isinstance(settings, _kind) for settings in ALGORITHMS.values()):
        ALGORITHMS[f"{_kind.__name__}_3"] = TypeAdapter(Algorithm).validate_python(
            {"name": _kind.__name__, "rank": 3, "alpha": 2.0}
        )


class Sample:
    """A layer, an input [B, …] for it, and its run with any weight."""

    def __init__(self, module: Any, x: Tensor) -> None:
        self.module = module
        self.x = x
        self.sizes = Layer.of("layer", module)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """With this weight instead of its own."""
        return torch.func.functional_call(self.module, {"weight": weight}, (x,))

    def adapted(self, adapter: Adapter, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return adapter(x, self.module(x), self.module.bias, self.module)


def filled(adapter: Adapter, std: float = 0.3) -> Adapter:
    """The same adapter with random weights."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return adapter


@pytest.fixture(params=LAYERS)
def sample(request: pytest.FixtureRequest) -> Sample:
    make, shape = LAYERS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Sample(make(), torch.randn(shape))


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    return ALGORITHMS[request.param]


@pytest.fixture
def adapter(algorithm: Any, sample: Sample) -> Adapter:
    """A trained one: random weights."""
    return filled(algorithm.build(sample.sizes, "layer", 0, sample.module))


@pytest.fixture(name="filled")
def filled_fixture() -> Callable[..., Adapter]:
    return filled


@pytest.fixture(name="sample_of")
def sample_of_fixture() -> type[Sample]:
    return Sample
