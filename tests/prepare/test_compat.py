"""Settings that exclude each other, the adapters, the machine or the processes."""

from typing import Any

import pytest
import torch

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import Config
from lorasmith.demo import BASE
from lorasmith.distributed.process_group import ALONE, World
from lorasmith.models.load import load_model
from lorasmith.prepare.compat import Circumstances, check_compatibility

CPU, CUDA, TWO = torch.device("cpu"), torch.device("cuda"), World(0, 2)
OFFSETS = AdapterSet({}, {"unet.conv_in.bias": torch.zeros(1)})


def check(
    values: dict[str, Any], adapters: AdapterSet | None = None, *, device: torch.device = CUDA, world: World = ALONE
) -> None:
    """Of a model that waits on the CPU."""
    check_compatibility(Config(**values), Circumstances(adapters or AdapterSet({}), CPU, device, world))


def of_algorithm(name: str) -> AdapterSet:
    config = Config.model_validate({"adapter": name})
    return AdapterSet.new(load_model(BASE).denoiser, config.adapter, config.targets, 0)


def test_offloading_is_refused_where_it_saves_nothing_or_an_adapter_misses_weights() -> None:
    check({"offloading": True}, of_algorithm("LoRA"))
    with pytest.raises(ValueError, match="^offloading must be False on cpu: the weights are there already"):
        check({"offloading": True}, device=CPU)
    with pytest.raises(ValueError, match="^offloading must be False without gradient_checkpointing"):
        check({"offloading": True, "gradient_checkpointing": False})
    for name, part in (("OFT", "bias"), ("DoRA", "weight")):
        with pytest.raises(ValueError, match=f"^offloading must be False with {name}: it reads each layer's {part}"):
            check({"offloading": True}, of_algorithm(name))
    with pytest.raises(ValueError, match=r"^offloading must be False with this existing_lora: .* \(diff\)"):
        check({"offloading": True}, OFFSETS)


def test_sharding_is_refused_where_it_saves_nothing_or_something_would_break() -> None:
    check({"sharded": True}, of_algorithm("LoRA"), world=TWO)
    with pytest.raises(ValueError, match="^sharded must be False in a single process"):
        check({"sharded": True})
    for setting in ("offloading", "memory_ladder"):
        with pytest.raises(ValueError, match=f"^sharded must be False with {setting}"):
            check({"sharded": True, setting: True}, world=TWO)
    with pytest.raises(ValueError, match=r"^sharded must be False with text_encoder\.train"):
        check({"sharded": True, "text_encoder": {"train": True}}, world=TWO)
    with pytest.raises(ValueError, match="^sharded must be False with DoRA"):
        check({"sharded": True}, of_algorithm("DoRA"), world=TWO)
    with pytest.raises(ValueError, match=r"^sharded must be False with this existing_lora: .* \(diff\)"):
        check({"sharded": True}, OFFSETS, world=TWO)


def test_what_needs_whole_weights_is_refused_beside_a_base_in_few_bits() -> None:
    check({"base_dtype": "int8"}, device=CPU)
    for name, why in (
        ("quantized_backward", "it computes gradients through unquantised weights"),
        ("offloading", "it moves unquantised weights"),
        ("sharded", "it shards unquantised weights"),
    ):
        with pytest.raises(ValueError, match=f"^base_dtype must be none with {name}: {why}$"):
            check({"base_dtype": "int8", name: True})
    with pytest.raises(ValueError, match=r"^base_dtype must be none with this existing_lora: .* \(diff\)$"):
        check({"base_dtype": "int8"}, OFFSETS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"non_finite": {"returns": 1}}, "checkpoints.steps must be set where non_finite.returns is, got none"),
        ({"text_encoder": {"learning_rate": 1e-4}}, "text_encoder.train must be true where"),
        ({"targets": {"preset": "none"}}, "targets must match a layer, got preset 'none' and no include"),
    ],
)
def test_settings_that_need_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check(values)
