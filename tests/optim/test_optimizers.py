"""Optimizers against their formulas, written out; schedules against closed forms; masters and the scale of losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import get_scheduler

from lorasmith.adapters.adapter_set import AdapterSet
from lorasmith.adapters.targets import Targets
from lorasmith.api import train_lora
from lorasmith.config.schema import Config
from lorasmith.devices import has_bf16
from lorasmith.diffusion.process import Flow
from lorasmith.optim.loss_scale import LossScale
from lorasmith.optim.master_weights import Masters, norm
from lorasmith.optim.optimizers import SGD, Adam, AdamW, Muon, Optimizer, RMSprop
from lorasmith.optim.schedules import Constant, Cosine, Linear
from lorasmith.training.loop import NonFiniteError
from lorasmith.training.state import State
from lorasmith.types import Cond, Result

LR = 0.1
GRADS = torch.tensor([[0.5, -2.0, 0.0], [0.25, 1.0, 1e-3], [-1.0, 3.0, 0.0]], dtype=torch.float64)
Formula = Callable[[Any, Tensor], Tensor]


def adam(o: Any, weight: Tensor, decoupled: bool) -> Tensor:
    """Algorithm 1 of Kingma and Ba 2015; decoupled: algorithm 2 of Loshchilov and Hutter 2019."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(GRADS, start=1):
        decay = o.weight_decay * weight
        g = grad if decoupled else grad + decay
        m = o.beta1 * m + (1 - o.beta1) * g
        v = o.beta2 * v + (1 - o.beta2) * g * g
        m_hat, v_hat = m / (1 - o.beta1**step), v / (1 - o.beta2**step)
        weight = weight - LR * m_hat / (v_hat.sqrt() + o.eps) - (LR * decay if decoupled else 0)
    return weight


def sgd(o: Any, weight: Tensor) -> Tensor:
    velocity = torch.zeros_like(weight)
    for grad in GRADS:
        velocity = o.momentum * velocity + grad + o.weight_decay * weight
        weight = weight - LR * velocity
    return weight


def rmsprop(o: Any, weight: Tensor) -> Tensor:
    square, velocity = torch.zeros_like(weight), torch.zeros_like(weight)
    for grad in GRADS:
        g = grad + o.weight_decay * weight
        square = o.alpha * square + (1 - o.alpha) * g * g
        velocity = o.momentum * velocity + g / (square.sqrt() + o.eps)
        weight = weight - LR * velocity
    return weight


CASES: list[tuple[Any, Formula]] = [
    (AdamW(), lambda o, w: adam(o, w, True)),
    (AdamW(weight_decay=0.5, beta1=0.5, beta2=0.9, eps=0.1), lambda o, w: adam(o, w, True)),
    (Adam(), lambda o, w: adam(o, w, False)),
    (Adam(weight_decay=0.5, beta1=0.0, beta2=0.5, eps=0.1), lambda o, w: adam(o, w, False)),
    (SGD(), sgd),
    (SGD(momentum=0.9, weight_decay=0.5), sgd),
    (RMSprop(), rmsprop),
    (RMSprop(alpha=0.5, momentum=0.9, weight_decay=0.5, eps=0.1), rmsprop),
]


@pytest.mark.parametrize(("optimizer", "formula"), CASES)
def test_three_steps_are_the_formula_s(optimizer: Any, formula: Formula) -> None:
    start = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    weight = start.clone().requires_grad_()
    (built,) = optimizer.build([weight], LR)
    for grad in GRADS:
        weight.grad = grad.clone()
        built.step()
    torch.testing.assert_close(weight.detach(), formula(optimizer, start), rtol=1e-12, atol=1e-12)


def test_defaults_are_torch_s() -> None:
    for name in ("AdamW", "Adam", "SGD", "RMSprop"):
        weights = [torch.tensor([2.0, -1.0, 0.5], requires_grad=True) for _ in range(2)]
        ours: Any = TypeAdapter(Optimizer).validate_python(name)
        assert ours.name == name
        theirs = getattr(torch.optim, name)
        for weight, built in zip(weights, (*ours.build(weights[:1], LR), theirs(weights[1:], lr=LR)), strict=True):
            for grad in GRADS.float():
                weight.grad = grad.clone()
                built.step()
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=0)


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton and Schulz' quintic iteration (Jordan et al. 2024) [n,m], n <= m."""
    matrix = matrix / matrix.norm()
    for _ in range(5):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * square + 2.0315 * square @ square) @ matrix
    return matrix


def test_muon_s_steps_are_the_formula_s_for_matrices_and_adamw_s_for_vectors() -> None:
    optimizer = Muon(momentum=0.5, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(3, 8, generator=generator) for _ in range(4))
    matrix, vector, twin = (tensor.clone().requires_grad_() for tensor in (start, start[0], start[0]))
    built = optimizer.build([matrix, vector], LR)
    adamw = torch.optim.AdamW([twin], lr=LR, weight_decay=0.1)
    expected, velocity = start, torch.zeros(3, 8)
    for grad in grads:
        matrix.grad, vector.grad, twin.grad = grad.clone(), grad[0].clone(), grad[0].clone()
        for one in (*built, adamw):
            one.step()
        velocity = 0.5 * velocity + 0.5 * grad
        update = orthogonal(0.5 * grad + 0.5 * velocity)
        expected = expected * (1 - LR * 0.1) - LR * 0.2 * math.sqrt(8) * update
    torch.testing.assert_close(matrix.detach(), expected, atol=1e-2, rtol=0)  # torch iterates in bf16
    assert torch.equal(vector, twin) and len(built) == 2
    assert len(optimizer.build([matrix], LR)) == len(optimizer.build([vector], LR)) == 1


@pytest.mark.parametrize("algorithm", ["LoRA", "LoKr", "OFT", "DoRA"])
def test_muon_is_given_each_parameter_as_a_matrix(algorithm: str, flow_denoiser: Any) -> None:
    config = Config.model_validate({"optimizer": "Muon", "adapter": algorithm, "targets": {"preset": "all"}})
    adapters = AdapterSet.new(flow_denoiser, config.adapter, config.targets, 0)
    state = State(adapters, config, is_fp16=False)
    with torch.no_grad():
        state.masters.vector.grad = torch.randn(len(state.masters.vector), generator=torch.Generator().manual_seed(1))
    state.step(lambda rate: rate)
    kept = {key: tensor for key, tensor in state.tensors().items() if key.startswith("optimizer/")}
    for name, shape in state.shapes.items():
        matrix = (shape[0], math.prod(shape[1:]))
        keys = ["momentum_buffer"] if len(shape) > 1 else ["exp_avg", "exp_avg_sq", "step"]
        assert {key.rpartition("/")[2] for key in kept if key.startswith(f"optimizer/{name}/")} == set(keys)
        if len(shape) > 1:
            assert kept[f"optimizer/{name}/momentum_buffer"].shape == matrix


def test_schedules() -> None:
    assert [Constant().factor(s, 4) for s in range(4)] == [1, 1, 1, 1]
    assert [Linear(end=0.5).factor(s, 4) for s in range(4)] == [1, 0.875, 0.75, 0.625]
    cosine = [Cosine().factor(s, 100) for s in range(100)]
    assert cosine[50] == pytest.approx(0.5) and cosine[0] == 1 and cosine == sorted(cosine, reverse=True)
    assert [Constant(warmup=3).factor(s, 9) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "name"),
    [(Linear(warmup=10), "linear"), (Cosine(warmup=10), "cosine"), (Constant(warmup=10), "constant_with_warmup")],
)
def test_schedules_fall_from_the_end_of_the_warmup_on_as_transformers_do(schedule: Any, name: str) -> None:
    """transformers' warm-up begins with a rate of 0, ours does not; behind it they agree."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        if step >= 10:
            assert schedule.factor(step, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        else:
            assert schedule.factor(step, 50) == (step + 1) / 11
        optimizer.step()
        theirs.step()


def test_a_warmup_as_long_as_the_run_only_rises() -> None:
    assert [Cosine(warmup=9).factor(step, 4) for step in range(4)] == [0.1, 0.2, 0.3, 0.4]


def test_masters_do_not_stall() -> None:
    """1000 steps of 2^-12 move a bf16 weight of 1 nowhere, and its master all the way."""
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    masters = Masters([weight])
    optimizer = torch.optim.SGD([masters.vector], lr=2**-12)
    for _ in range(1024):
        masters.clear()
        (-weight).sum().backward()
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.write()
    assert float(weight.detach()) == 1.25
    assert float(torch.ones(1, dtype=torch.bfloat16) + 2**-12) == 1


def test_fp32_parameters_are_part_of_their_masters() -> None:
    weights = [torch.full(shape, float(len(shape)), requires_grad=True) for shape in ((2,), (3, 1))]
    masters = Masters(weights)
    assert masters.vector.tolist() == [1, 1, 2, 2, 2]
    masters.vector.data += 1
    assert [weight.tolist() for weight in weights] == [[2, 2], [[3], [3], [3]]]


def test_the_norm_of_many_numbers_is_that_of_doubles() -> None:
    vector = 1e-3 * torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0))
    assert norm(vector) == pytest.approx(float(vector.double().norm()), rel=1e-6)
    assert norm(torch.tensor([3.0, 4.0])) == 5 and norm(torch.tensor([3e38, 3e38])) == math.inf


def test_gradients_of_micro_batches_add_up() -> None:
    """Where a parameter got none, there is a zero, and it is told apart."""
    weights = [torch.zeros(2, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    masters = Masters(weights)
    masters.clear()
    with masters.reached() as reached:
        for number in (1.0, 2.0**-10):  # in bf16 the sum would be 1
            (number * weights[0].sum() + 0 * weights[2].sum()).backward()
            masters.take_gradients()
    assert masters.gradient().tolist() == [1 + 2**-10] * 2 + [0] * 4
    assert masters.gradients(reached).keys() == {id(weights[0]), id(weights[2])}
    masters.clear()
    assert masters.gradient().tolist() == [0] * 6
    masters.release()
    assert all(weight.grad is None for weight in weights)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4), st.integers(0, 24))
def test_unscaled_gradients_are_those_without_a_scale(values: list[float], exponent: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        taken = []
        for scale in (1.0, 2.0**exponent):
            weight = torch.zeros(len(values), dtype=dtype, requires_grad=True)
            masters = Masters([weight])
            masters.clear()
            (weight * (torch.tensor(values).to(dtype) * scale)).sum().backward()
            masters.take_gradients()
            masters.scale(1 / scale)
            assert masters.gradient().dtype == torch.float32
            taken.append(masters.gradient())
        assert torch.equal(*taken)


def with_gradient(value: float) -> Masters:
    """Of a weight whose gradient holds this number."""
    masters = Masters([torch.zeros(2, requires_grad=True)])
    masters.vector.grad = torch.tensor([1.0, value])
    return masters


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_the_scale_is_halved_down_to_1_while_gradients_are_not_finite(value: float) -> None:
    """3e38 is finite, but the norm of gradients, which clipping needs, is not."""
    scale, halvings = LossScale(True), 0
    while scale.overflowed(masters := with_gradient(value)):
        halvings += 1
        assert masters.vector.grad is None
        assert math.frexp(scale.value)[0] == 0.5
    assert (halvings, scale.value) == (16, 1.0)
    assert masters.vector.grad is not None


def test_the_scale_doubles_after_2000_good_steps_in_a_row_up_to_its_limit() -> None:
    scale = LossScale(True)
    assert scale.value == 2**16
    for _ in range(1999):
        assert not scale.overflowed(with_gradient(0.0))
    assert scale.overflowed(with_gradient(math.inf)) and scale.value == 2**15
    for exponent in (*range(15, 25), 24):
        assert scale.value == 2**exponent
        for _ in range(1999):
            assert not scale.overflowed(with_gradient(1.0)) and scale.value == 2**exponent
        scale.overflowed(with_gradient(1.0))
    assert scale.value == 2**24


def test_without_fp16_there_is_no_scale() -> None:
    scale = LossScale(False)
    assert not scale.overflowed(masters := with_gradient(math.inf))
    assert scale.value == 1 and masters.vector.grad is not None


@dataclass(frozen=True)
class Steep:
    """A linear layer in its own dtype whose output is multiplied afterwards, and with it its gradient."""

    net: nn.Module
    factor: float
    process: Flow = Flow()

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x_t = x_t.to(next(self.net.parameters()).dtype)
        return self.factor * self.net(x_t.movedim(1, -1)).movedim(-1, 1).float()

    def file_key(self, path: str) -> str:
        return f"lora_{path}"


def trained(dtype: torch.dtype, factor: float, training_dtype: Any, **inputs: Any) -> Result:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Steep(nn.Sequential(nn.Linear(4, 4)).to(dtype), factor)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return train_lora(
        model, latents, [torch.zeros(1, 1)], steps=3, targets=Targets(preset="all"), training_dtype=training_dtype,
        **inputs,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [1.0, 2.0**6, 2.0**9])
@pytest.mark.parametrize("lora_dtype", ["bf16", "fp32"])
def test_gradients_that_overflow_in_fp16_are_tried_again_at_a_lower_scale(
    factor: float, lora_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    overflowed = LossScale.overflowed

    def noted(scale: LossScale, masters: Masters) -> bool:
        tried.append(scale.value)
        return overflowed(scale, masters)

    monkeypatch.setattr(LossScale, "overflowed", noted)
    inputs: dict[str, Any] = {"lora_dtype": lora_dtype, "optimizer": "SGD", "learning_rate": 0.01}
    result = trained(torch.float16, factor, "none", **inputs)
    assert tried[0] == 2**16 and len(tried) == 3 + sum(a != b for a, b in zip(tried, tried[1:], strict=False))
    assert (tried[-1] < 2**16) == (factor > 1)
    assert len(result.loss["loss"]) == result.steps == 3 and torch.tensor(result.loss["loss"]).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in result.lora.values())
    assert result.lora["lora_net.0.lora_up.weight"].any()
    in_fp32 = trained(torch.float32, factor, "none", **inputs)
    assert result.loss["loss"] == pytest.approx(in_fp32.loss["loss"], rel=0.02)
    moved, expected = (one.lora["lora_net.0.lora_up.weight"].float() for one in (result, in_fp32))
    assert float((moved - expected).norm()) < 0.05 * float(expected.norm())


def test_gradients_that_overflow_without_a_scale_too_are_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"the gradient of the adapter on net.0 is (nan|inf)"):
        trained(torch.float16, 2.0**12, "none")


@pytest.mark.parametrize("algorithm", ["LoRA", "OFT"])
def test_none_is_the_model_s_own_dtype(algorithm: Any) -> None:
    native = [(torch.float32, "fp32"), (torch.bfloat16, "bf16")][: 1 + has_bf16(torch.device("cpu"))]
    for dtype, name in native:
        own, named = (trained(dtype, 1.0, asked, algorithm=algorithm) for asked in ("none", name))
        assert own.loss == named.loss
        assert all(torch.equal(tensor, named.lora[key]) for key, tensor in own.lora.items())
    assert trained(torch.float32, 1.0, "none").loss != trained(torch.float16, 1.0, "none").loss
