"""Targets, and adapters on nets by hooks: which layers, how they are called, and what is refused."""

from dataclasses import dataclass
from typing import Any

import plain_net
import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attach, attached
from lorasmith.adapters.targets import Targets, adaptable_layers
from lorasmith.config.arguments import parsed
from lorasmith.config.values import configured
from lorasmith.models.families.sd import StableDiffusion


class Net(nn.Module):
    """One layer called by keyword, one never called, one whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.by_keyword, self.idle, self.cut_off = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.cut_off(x)
        return self.by_keyword(input=x)


class Plain(plain_net.Plain):
    """With names in files that no program has."""

    def file_key(self, path: str) -> str:
        return path.replace(".", "_")


@dataclass(frozen=True)
class Partly(Plain):
    """One that knows what its net throws away."""

    def unread(self) -> set[str]:
        return {"net.idle", "net.cut_off"}


def adapters_for(denoiser: Any, **targets: Any) -> AdapterSet:
    adapters = AdapterSet.new(denoiser, LoRA(rank=2), Targets(**targets), 0)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return adapters


def test_a_layer_called_by_keyword_is_adapted_and_comes_back() -> None:
    denoiser, x = Plain(Net()), torch.randn(2, 4)
    before = denoiser.net(x)
    with attached(denoiser, adapters_for(denoiser, preset="all")):
        assert not torch.equal(denoiser.net(x), before)
    assert torch.equal(denoiser.net(x), before)


def test_nothing_in_the_net_is_replaced_or_renamed() -> None:
    denoiser = Plain(Net())
    before = {name: id(module) for name, module in denoiser.net.named_modules()}
    attach(denoiser, adapters_for(denoiser, preset="all"))
    assert {name: id(module) for name, module in denoiser.net.named_modules()} == before
    assert set(denoiser.net.state_dict()) == {f"{n}.{p}" for n in before if n for p in ("weight", "bias")}


def gradients(adapters: AdapterSet) -> dict[int, Tensor]:
    return {id(p): p.grad for p in adapters.parameters() if p.grad is not None}


@pytest.mark.parametrize(("exclude", "message"), [((), "1 of 3 adapters \\(net.idle\\) never ran"), (("idle",), "\\(net.cut_off\\) got no gradient")])  # fmt: skip # noqa: E501
def test_adapters_that_learn_nothing_are_named(exclude: tuple[str, ...], message: str) -> None:
    denoiser = Plain(Net())
    adapters = adapters_for(denoiser, preset="all", exclude=exclude)
    with attached(denoiser, adapters):
        denoiser.net(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=message):
        adapters.refuse_unused(gradients(adapters), {"net"}, denoiser)


def test_layers_that_no_prediction_depends_on_get_no_adapter_but_may_have_one_of_another_program() -> None:
    denoiser = Partly(Net())
    assert set(adapters_for(denoiser, preset="all").adapters) == {"net.by_keyword"}
    with pytest.raises(ValueError, match="targets must match a layer"):
        adapters_for(denoiser, preset="none", include=("idle",))
    adapters = adapters_for(Plain(denoiser.net), preset="all")
    with attached(denoiser, adapters):
        denoiser.net(torch.randn(2, 4)).sum().backward()
    assert adapters.refuse_unused(gradients(adapters), {"net"}, denoiser) == {"net"}


def test_presets_on_stable_diffusion(family: StableDiffusion) -> None:
    layers = set(adaptable_layers(family.denoiser.nets))
    chosen = {name: {p for p in layers if Targets(preset=name).matches(p)} for name in ("attention", "attention+mlp", "all", "none")}  # fmt: skip # noqa: E501
    assert {p.split("transformer_blocks.0.")[1] for p in chosen["attention"]} == {
        f"attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert {p.split("transformer_blocks.0.")[1] for p in chosen["attention+mlp"] - chosen["attention"]} == {
        "ff.net.0.proj", "ff.net.2",
    }  # fmt: skip
    assert chosen["all"] == layers and not chosen["none"]
    assert {type(m) for m in adaptable_layers(family.denoiser.nets).values()} == {nn.Linear, nn.Conv2d}


def test_include_and_exclude() -> None:
    targets = Targets(preset="attention", include=(r"conv_in$",), exclude=(r"attn2",))
    assert targets.matches("unet.conv_in") and targets.matches("unet.x.attn1.to_q")
    assert not targets.matches("unet.x.attn2.to_q") and not targets.matches("unet.conv_in.norm")


def test_what_is_included_is_all_unless_a_preset_is_given() -> None:
    from_tokens = ("--targets.include", "attn2", "--targets.include", "conv_in")
    for alone in (Targets(include=("attn2", "conv_in")), configured(parsed(from_tokens)[1]).targets):
        assert alone.matches("unet.x.attn2.to_q") and alone.matches("unet.conv_in")
        assert not alone.matches("unet.x.attn1.to_q") and alone.preset == "none"
        assert Targets.model_validate(alone.model_dump()) == alone  # as a run.toml has it
    assert Targets(include=()).preset == Targets(exclude=("attn2",)).preset == "attention+mlp"


def test_no_target_is_an_error_that_shows_layers() -> None:
    with pytest.raises(
        ValueError, match=r"targets must match a layer, got preset 'none'.*for 3 layers such as net.by_"
    ):
        AdapterSet.new(Plain(Net()), LoRA(), Targets(preset="none"), 0)


def test_file_state_is_sorted_and_in_the_asked_dtype() -> None:
    denoiser = Plain(Net())
    state = adapters_for(denoiser, preset="all").file_state(denoiser, torch.bfloat16)
    assert list(state) == sorted(state) and "net_idle.lora_up.weight" in state
    assert {t.dtype for k, t in state.items() if "lora_" in k} == {torch.bfloat16}
