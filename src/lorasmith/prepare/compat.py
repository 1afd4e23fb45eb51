"""Which settings exclude each other, the adapters, the machine or the processes, in one list."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.config.schema import Config
from lorasmith.devices import model_dtype
from lorasmith.distributed.process_group import World
from lorasmith.prepare.int8_backward import refuse_unfit_int8
from lorasmith.prepare.quantize import refuse_without_kernels


@dataclass(frozen=True)
class Circumstances:
    """What settings are to be used with."""

    adapters: AdapterSet  # empty: not known yet
    home: torch.device  # where the model's weights are
    device: torch.device  # where it trains
    world: World


def check_compatibility(config: Config, circumstances: Circumstances) -> None:
    """ValueError that names the setting, the rule and the reason where two things exclude each other."""
    for is_broken, message in _rules(config, circumstances):
        if is_broken:
            raise ValueError(message)
    device = circumstances.device
    if config.base_dtype != "none" and (dtype := model_dtype(config.training_dtype, device)) is not None:
        refuse_without_kernels(config.base_dtype, device, dtype)
    if config.quantized_backward:
        refuse_unfit_int8(device)


def _rules(config: Config, of: Circumstances) -> Iterator[tuple[bool, str]]:
    """(whether it is broken, what is said then)."""
    text_encoder, is_new = config.text_encoder, config.existing_lora is None
    yield (
        bool(config.non_finite.returns) and config.checkpoints.steps is None,  # by the clock it could be another step
        "checkpoints.steps must be set where non_finite.returns is, got none",
    )
    yield (
        text_encoder.learning_rate is not None and not text_encoder.train,
        "text_encoder.train must be true where text_encoder.learning_rate is set, got false",
    )
    yield (
        is_new and config.targets.preset == "none" and not config.targets.include,
        "targets must match a layer, got preset 'none' and no include",
    )
    if config.base_dtype != "none":
        yield from (
            (is_broken, f"base_dtype must be none {why}")
            for is_broken, why in (
                (
                    config.quantized_backward,
                    "with quantized_backward: it computes gradients through unquantised weights",
                ),
                (config.offloading, "with offloading: it moves unquantised weights"),
                (config.sharded, "with sharded: it shards unquantised weights"),
                (bool(of.adapters.offsets), "with this existing_lora: it changes weights themselves (diff)"),
            )
        )
    if config.offloading:
        yield from ((is_broken, f"offloading must be False {why}") for is_broken, why in _offloading_rules(config, of))
    if config.sharded:
        yield from ((is_broken, f"sharded must be False {why}") for is_broken, why in _sharding_rules(config, of))


def _offloading_rules(config: Config, of: Circumstances) -> Iterator[tuple[bool, str]]:
    """Where it would save nothing, or where an adapter would miss a weight that is away."""
    yield of.home.type == of.device.type, f"on {of.device.type}: the weights are there already"
    yield (
        not config.gradient_checkpointing,
        "without gradient_checkpointing: every weight would stay for the backward pass",
    )
    for name in of.adapters.needing_biases:
        yield True, f"with {name}: it reads each layer's bias, which is away by then"
    for name in of.adapters.needing_weights:
        yield True, f"with {name}: it reads each layer's weight, which is away by then"
    yield bool(of.adapters.offsets), "with this existing_lora: it changes weights themselves (diff), which are away"


def _sharding_rules(config: Config, of: Circumstances) -> Iterator[tuple[bool, str]]:
    """Where it would save nothing, or where something would miss weights or other processes."""
    yield of.world.size == 1, "in a single process: there is no other to hold a share (torchrun starts several)"
    yield config.offloading, "with offloading: the weights wait on the CPU already"
    yield config.memory_ladder, "with memory_ladder: where one process runs out, the others would wait for its share"
    yield config.text_encoder.train, "with text_encoder.train: text encoders are not shared out yet"
    for name in of.adapters.needing_weights:
        yield True, f"with {name}: it reads each layer's weight, which is in parts"
    yield bool(of.adapters.offsets), "with this existing_lora: it changes weights themselves (diff), which are in parts"
