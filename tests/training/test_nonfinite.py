"""Where NaN and infinities come from: planted in inputs, weights, adapters and backward passes, and named."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiers import table
from torch import Tensor, nn

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.algorithms import LoRA
from lorasmith.adapters.hooks import attached
from lorasmith.adapters.targets import Targets
from lorasmith.config.schema import Config
from lorasmith.models.families.sd import StableDiffusion
from lorasmith.prepare.activation_checkpointing import checkpointed
from lorasmith.prepare.share import shared_copy
from lorasmith.training.nonfinite import origin_of_non_finite
from lorasmith.training.objective import noised
from lorasmith.types import Batch, Denoiser

ALL = Config(adapter=LoRA(rank=1), targets=Targets(preset="all"))  # of rank 1, which is never multiplied out first
ONE = Config(targets=Targets(preset="none", include=(r"conv_in$|pos_embed",)))  # most layers are bare
NO_SAMPLE = "no sample alone: the sum over the group's samples overflows, or its norm"


@dataclass(frozen=True)
class Case:
    """A net and finite samples, cat.png (number 45) and dog.png (46); the net's layers by the part they play."""

    denoiser: Denoiser
    group: Batch
    norm: str  # the first one that the latents come to
    queries: str  # and the next ones: of the attention in a block that checkpoints run again
    keys: str
    values: str
    attended: str  # takes what the attention makes of them
    last_before: str  # the last layer to run before that
    out: str  # the net's last layer

    @property
    def layers(self) -> dict[str, Any]:
        return {path: m for name, net in self.denoiser.nets.items() for path, m in net.named_modules(prefix=name)}

    def set_weight(self, path: str, change: Callable[[Tensor], Tensor]) -> None:
        """Changes a layer's weight in the case's net, not in the family's, which shares it."""
        layer = self.layers[path]
        layer.weight = nn.Parameter(change(layer.weight.detach().clone()))

    def with_latent(self, index: int, change: Callable[[Tensor], Tensor]) -> Batch:
        x0 = self.group.x0.clone()
        x0[index] = change(x0[index])
        return replace(self.group, x0=x0)

    def new_adapters(self, config: Config = ALL) -> AdapterSet:
        """None of their parameters is zero."""
        adapters = AdapterSet.new(self.denoiser, config.adapter, config.targets, 0)
        generator = torch.Generator().manual_seed(0)
        for parameter in adapters.parameters():
            parameter.data.normal_(0, 0.01, generator=generator)
        return adapters

    def origin(
        self, config: Config = ALL, group: Batch | None = None, adapters: AdapterSet | None = None, scale: float = 1.0
    ) -> str:
        adapters = adapters or self.new_adapters(config)
        with attached(self.denoiser, adapters):
            return origin_of_non_finite(self.denoiser, adapters, group or self.group, config, scale)

    def named(self, index: int, origin: str) -> str:
        """What is to be said of a sample."""
        t = noised(self.denoiser, self.group, ALL)[1][index].item()
        return f"sample {self.group.names[index]} (number {self.group.numbers[index]}, t {t:.4g}): {origin}"


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    """Puts this number at a tensor's start."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


def unet_case(family: StableDiffusion, latents: Tensor, texts: Tensor) -> Case:
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    return Case(
        shared_copy(family.denoiser, torch.device("cpu"), torch.float32),
        Batch(latents[:2], {"text": texts[:2]}, (45, 46), ("cat.png", "dog.png")),
        norm="unet.down_blocks.0.resnets.0.norm1", queries=f"{attention}.to_q", keys=f"{attention}.to_k",
        values=f"{attention}.to_v", attended=f"{attention}.to_out.0", last_before=f"{attention}.to_v",
        out="unet.conv_out",
    )  # fmt: skip


def sd3_case(flow_denoiser: Any, latents: Tensor, texts: Tensor) -> Case:
    attention = "transformer.transformer_blocks.1.attn"
    cond = {"text": texts[:2, :, :16], "pooled": texts[:2, 0, :8]}
    return Case(
        shared_copy(flow_denoiser), Batch(latents[:2, :, :8, :8], cond, (45, 46), ("cat.png", "dog.png")),
        norm="transformer.transformer_blocks.0.norm1.norm", queries=f"{attention}.to_q", keys=f"{attention}.to_k",
        values=f"{attention}.to_v", attended=f"{attention}.to_out.0", last_before=f"{attention}.add_v_proj",
        out="transformer.proj_out",
    )  # fmt: skip


@pytest.fixture(params=["unet", "unet, checkpointed", "sd3", "sd3, checkpointed"])
def case(
    request: pytest.FixtureRequest, family: StableDiffusion, flow_denoiser: Any, latents: Tensor, texts: Tensor
) -> Iterator[Case]:
    made = unet_case(family, latents, texts) if "unet" in request.param else sd3_case(flow_denoiser, latents, texts)
    with checkpointed(made.denoiser, 2) if "checkpointed" in request.param else nullcontext():
        yield made


@pytest.mark.parametrize("config", [ALL, ONE])
@pytest.mark.parametrize(("value", "found"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
def test_a_bad_weight_names_its_layer_and_the_first_sample(
    case: Case, config: Config, value: float, found: str
) -> None:
    """With an adapter on it or without; the layers behind it and the blocks around it put out NaN too."""
    case.set_weight(case.values, spoilt(value))
    assert case.origin(config) == case.named(0, f"the output of {case.values} is {found}")


@pytest.mark.parametrize(("value", "found"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_bad_weight_of_an_adapter_names_its_layer(case: Case, value: float, found: str) -> None:
    adapters = case.new_adapters()
    *_, up = adapters.adapters[case.values].parameters()
    up.data = spoilt(value)(up.data)
    origin = f"the output of {case.values} (with its adapter) is {found}"
    assert case.origin(adapters=adapters) == case.named(0, origin)


def test_a_latent_that_is_too_large_names_its_sample(case: Case) -> None:
    group = case.with_latent(1, spoilt(3e38))
    assert case.origin(group=group) == case.named(1, f"the output of {case.norm} is nan")


@table(
    ("value", "found"),
    [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")],
    quick=[(math.inf, "inf")],
)
def test_a_bad_input_is_named(case: Case, value: float, found: str) -> None:
    group = case.with_latent(1, spoilt(value))
    assert case.origin(group=group) == case.named(1, f"its noised latent is {found}")
    for name, tensor in case.group.cond.items():
        cond = {**case.group.cond, name: torch.stack([tensor[0], spoilt(value)(tensor[1])])}
        found_in = case.origin(group=replace(case.group, cond=cond))
        assert found_in == case.named(1, f"its conditioning {name} is {found}")


def test_what_runs_between_layers_is_not_blamed_on_a_layer(case: Case) -> None:
    """The products of finite queries and keys overflow, in an attention that is a function."""
    for path in (case.queries, case.keys):
        case.set_weight(path, lambda weight: weight * 1e25)
    assert case.origin(ONE) == case.named(0, f"the input of {case.attended} is nan")


def test_the_net_itself_is_a_module_and_its_output_a_mapping(case: Case) -> None:
    ((name, net),) = case.denoiser.nets.items()
    net.register_forward_hook(lambda module, args, output: type(output)(sample=output.sample * math.inf))
    assert case.origin() == case.named(0, f"the output of {name} is inf")


def test_a_loss_that_overflows_where_all_outputs_are_finite(case: Case) -> None:
    case.set_weight(case.out, lambda weight: weight * 1e25)
    assert case.origin(ONE) == case.named(0, "the loss is inf")


class _ThroughHalf(torch.autograd.Function):
    """The identity, whose gradient, times a factor, passes through fp16: above 65504 it becomes infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * ctx.factor).half().float() / ctx.factor, None


@pytest.mark.parametrize("index", [0, 1])
def test_a_gradient_that_overflows_names_its_adapter_and_sample(case: Case, index: int) -> None:
    """It does in front of a layer, for one sample: that layer's own adapter gets a good one, all before it do not."""
    peaks: list[float] = []
    (net,) = case.denoiser.nets.values()

    def before_net(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_t = args[0] if args else kwargs["hidden_states"]
        peaks.append(x_t.max().item())

    def before_layer(module: nn.Module, args: tuple[Tensor]) -> Any:
        return (_ThroughHalf.apply(args[0], 2.0**20 if peaks[-1] > 50 else 1.0),)

    net.register_forward_pre_hook(before_net, with_kwargs=True)
    case.layers[case.attended].register_forward_pre_hook(before_layer)
    group = case.with_latent(index, spoilt(1e3))
    assert case.origin(group=group, scale=2.0**-16) == NO_SAMPLE
    found = case.origin(group=group, scale=2.0**16)
    assert found == case.named(index, f"the gradient of the adapter on {case.last_before} is nan")


def test_a_group_whose_samples_are_finite(case: Case) -> None:
    assert case.origin() == NO_SAMPLE


def num_hooks(denoiser: Denoiser) -> list[int]:
    modules = [module for net in denoiser.nets.values() for module in net.modules()]
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_hooks_go_and_gradients_stay(case: Case, value: float) -> None:
    """Of the adapters, and of weights, frozen or not."""
    case.set_weight(case.values, spoilt(value))
    adapters = case.new_adapters()
    weights = [parameter for net in case.denoiser.nets.values() for parameter in net.parameters()]
    held = [torch.ones_like(parameter) for parameter in adapters.parameters()]
    for parameter, grad in zip(adapters.parameters(), held, strict=True):
        parameter.grad = grad
    before = num_hooks(case.denoiser)
    case.origin(adapters=adapters)
    assert num_hooks(case.denoiser) == before
    assert all(p.grad is grad and grad.eq(1).all() for p, grad in zip(adapters.parameters(), held, strict=True))
    assert any(w.requires_grad for w in weights) and all(w.grad is None for w in weights)


def test_hooks_go_where_the_net_raises(case: Case) -> None:
    def broken(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise RuntimeError("broken")

    before = num_hooks(case.denoiser)
    with case.layers[case.out].register_forward_pre_hook(broken), pytest.raises(RuntimeError, match="broken"):
        case.origin()
    assert num_hooks(case.denoiser) == before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_do_not_matter(case: Case, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    adapters = case.new_adapters()
    with mode():
        assert case.origin(adapters=adapters) == NO_SAMPLE
    case.set_weight(case.values, spoilt(math.nan))
    with mode():
        assert case.origin(adapters=adapters) == case.named(0, f"the output of {case.values} is nan")
