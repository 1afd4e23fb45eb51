"""The noise process against lorasmith's own, raw predictions, and networks that write over their activations."""

import copy
from typing import Any

import pytest
import stand_ins
import torch
from torch import Tensor, nn

from lorasmith.diffusion.process import Diffusion, Flow
from lorasmith.prepare.activation_checkpointing import checkpointed
from lorasmith.prepare.share import shared_copy


def vp(sigma: Tensor) -> Tensor:
    return 1 / (sigma**2 + 1)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_diffusion_processes_are_lorasmiths(kind: Any) -> None:
    """ComfyUI's x_t is the usual one over sqrt(a); what the net should return is the same."""
    from pack.denoiser import SamplingProcess

    ours = SamplingProcess(stand_ins.Noise() if kind == "eps" else stand_ins.Velocity())
    t = torch.tensor([0, 500, 999])
    sigma = stand_ins.Noise.sigmas[t]
    theirs = Diffusion(vp(stand_ins.Noise.sigmas), kind)
    x0, eps, out = torch.randn(3, 3, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    x_t = ours.noise(x0, eps, sigma)
    scaled = x_t * vp(sigma).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled, theirs.noise(x0, eps, t))
    torch.testing.assert_close(ours.target(x0, eps, sigma), theirs.target(x0, eps, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.x0(x_t, out, sigma), theirs.x0(scaled, out, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eps(x_t, out, sigma), theirs.eps(scaled, out, t), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.snr(sigma), theirs.snr(t), rtol=1e-4, atol=0)


def test_flows_are_lorasmiths() -> None:
    from pack.denoiser import SamplingProcess

    ours, theirs = SamplingProcess(stand_ins.FlowSampling()), Flow()
    x0, eps, out = torch.randn(3, 4, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1e-7, 0.1, 0.5, 0.999])
    for name in ("noise", "target"):
        torch.testing.assert_close(getattr(ours, name)(x0, eps, t), getattr(theirs, name)(x0, eps, t))
    for name in ("x0", "eps"):
        torch.testing.assert_close(getattr(ours, name)(eps, out, t), getattr(theirs, name)(eps, out, t))
    torch.testing.assert_close(ours.snr(t), theirs.snr(t), rtol=1e-4, atol=0)


def test_times_leave_the_ends_out() -> None:
    from pack.denoiser import SamplingProcess

    t = SamplingProcess(stand_ins.FlowSampling()).time(torch.tensor([0.0, 0.25, 1 - 2**-24]))
    assert t.tolist() == pytest.approx([2**-24, 0.25, 1 - 2**-24]) and (t > 0).all() and (t < 1).all()


def denoiser(patcher: Any, *entries: list[Any]) -> Any:
    from pack.conditioning import prepared
    from pack.denoiser import ComfyDenoiser

    samples, found = prepared(patcher.model, [stand_ins.latents(len(entries))], [list(entries)], are_buckets=False)
    assert [sample.cond["entry"].tolist() for sample in samples] == [[number] for number in range(len(entries))]
    return ComfyDenoiser(patcher.model, found, patcher.model_options)


ENTRIES = (
    [stand_ins.entry(number) for number in range(4)],
    [stand_ins.entry(0), stand_ins.entry(1, 6), stand_ins.entry(2, 6), stand_ins.entry(3)],
    [stand_ins.entry(0), stand_ins.entry(1, area=(2, 2, 0, 0)), stand_ins.entry(2), stand_ins.entry(3, control="net")],
)


@pytest.mark.parametrize("entries", ENTRIES, ids=["alike", "two lengths", "some by themselves"])
def test_each_sample_has_its_own_conditioning_and_the_output_is_raw(patcher: Any, entries: list[Any]) -> None:
    twin = shared_copy(denoiser(patcher, *entries))
    x, t = torch.randn(4, 4, 4, 4), torch.tensor([0.1, 1.0, 5.0, 10.0])
    outputs = twin.predict(x, t, {"entry": torch.arange(4.0)[:, None]})
    for number, (text, _) in enumerate(entries):
        one = patcher.model.apply_model(x[number : number + 1], t[number : number + 1], c_crossattn=text)
        raw = (x[number] - one[0]) / t[number]
        torch.testing.assert_close(outputs[number], raw, rtol=1e-3, atol=1e-4)


def test_the_callers_model_is_not_touched(patcher: Any) -> None:
    before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    twin = shared_copy(denoiser(patcher, stand_ins.entry(0)), dtype=torch.bfloat16)
    assert twin.model.manual_cast_dtype == torch.bfloat16 and twin.model.current_patcher.model is twin.model
    assert patcher.model.manual_cast_dtype is None and patcher.model.current_patcher is None
    assert "forward" not in vars(patcher.model.diffusion_model)
    assert all(torch.equal(before[key], value) for key, value in patcher.model.state_dict().items())


@pytest.mark.parametrize(("kind", "own"), [("Linear", torch.nn.Linear), ("Conv2d", torch.nn.Conv2d)])
def test_layers_that_only_multiply_are_torch_s_own_in_the_copy(patcher: Any, kind: str, own: type) -> None:
    net, theirs = patcher.model.diffusion_model, vars(stand_ins)[kind]
    layers = [theirs(4, 4, 1) for _ in range(5)]
    layers[4].forward = layers[4].forward
    layers[1].comfy_cast_weights, layers[2].weight_function, layers[3].bias_function = True, (abs,), (abs,)
    net.extra = torch.nn.ModuleList(layers)
    twin = shared_copy(denoiser(patcher, stand_ins.entry(0)))
    kinds = [type(layer) for layer in twin.model.diffusion_model.extra]
    assert kinds == [own, theirs, theirs, theirs, theirs]
    assert {type(layer) for layer in net.extra} == {theirs}


@pytest.mark.parametrize("depth", [None, 1])
def test_activations_that_the_net_writes_over_have_gradients(patcher: Any, depth: int | None) -> None:
    twin = shared_copy(denoiser(patcher, stand_ins.entry(0)))
    net = copy.deepcopy(patcher.model.diffusion_model)
    weight = twin.model.diffusion_model.text.weight.requires_grad_(True)
    x, t = torch.randn(1, 4, 4, 4), torch.ones(1)
    with checkpointed(twin, depth) if depth else torch.enable_grad():
        twin.predict(x, t, {"entry": torch.zeros(1, 1)}).square().sum().backward()

    def plain(value: Tensor) -> Tensor:
        h = (x / 2**0.5).movedim(1, -1) + nn.functional.linear(stand_ins.entry(0)[0], value, net.text.bias).mean(1)
        for block in net.blocks:
            h = h + block["attn"](net.norm(h))
        return h.square().sum()

    (expected,) = torch.autograd.grad(plain(value := weight.detach().clone().requires_grad_(True)), value)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_call_that_nothing_takes_the_result_of_stays_in_place() -> None:
    from pack.denoiser import OutOfPlace

    mode, x = OutOfPlace(), torch.ones(3, requires_grad=True) * 2

    def called(y: Tensor) -> Tensor:
        y.add_(1)
        return y

    def stated(y: Tensor) -> Tensor:
        y *= 10
        y -= 1
        return y

    assert mode.around(called)(x) is x and x.tolist() == [3, 3, 3]
    assert mode.around(stated)(x).tolist() == [29, 29, 29] and x.tolist() == [3, 3, 3]
    with torch.no_grad():
        assert mode.around(stated)(x) is x
