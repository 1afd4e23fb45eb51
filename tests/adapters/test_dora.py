"""What DoRA has of its own: PEFT's layer and gradients, the paper's formula, lengths of rows, files of others."""

from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import DoRA, LoRA
from lorasmith.adapters.base import Layer
from lorasmith.adapters.dora import DoRAAdapter
from lorasmith.adapters.frozen_weight import row_products, row_squares
from lorasmith.adapters.registry import adapter_from_file
from lorasmith.ops.dora import decomposed, row_norms

ALPHA, RANK = 2, 4


def made(sample: Any, filled: Any, **settings: Any) -> DoRAAdapter:
    """A trained adapter of the sample's layer."""
    algorithm = DoRA(**{"rank": RANK, "alpha": ALPHA, **settings})
    return filled(algorithm.build(sample.sizes, "layer", 0, sample.module))


def updated(adapter: DoRAAdapter, weight: Tensor) -> Tensor:
    """W + s B A."""
    return weight + adapter.alpha / adapter.rank * (adapter.up.flatten(1) @ adapter.down.flatten(1)).view_as(weight)


def along(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.ndim - 1))


def formula(adapter: DoRAAdapter, weight: Tensor) -> Tensor:
    """The paper's equation 5; its norm a constant, as in section 4.3."""
    lengths = weight.flatten(1).norm(dim=1)
    whole = updated(adapter, weight)
    norm = whole.detach().flatten(1).norm(dim=1)
    return along((lengths + adapter.change) / norm, weight) * whole


def peft_layer(sample: Any, adapter: DoRAAdapter) -> Any:
    """PEFT's model of the layer alone, with the adapter's weights."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True)
    model: Any = peft.get_peft_model(nn.Sequential(deepcopy(sample.module)), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(adapter.down)
    layer.lora_B["default"].weight.data.copy_(adapter.up)
    vector = layer.lora_magnitude_vector["default"].weight
    vector.data.copy_(adapter.magnitudes().view_as(vector))
    return model


def peft_can(sample: Any) -> bool:
    """PEFT splits A between groups, which readers of LoRA files do not, and leaves dilation out."""
    return sample.sizes.groups == 1 and not (sample.sizes.conv and max(sample.sizes.conv.dilation) > 1)


def test_the_same_weights_make_the_same_layer_and_gradients_as_peft(sample: Any, filled: Any) -> None:
    if not peft_can(sample):
        pytest.skip("PEFT splits A between groups, and leaves dilation out")
    adapter = made(sample, filled)
    model = peft_layer(sample, adapter)
    theirs = model.base_model.model[0]
    ours, x = sample.x.clone().requires_grad_(), sample.x.clone().requires_grad_()
    y, expected = sample.adapted(adapter, ours), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, [ours, adapter.down, adapter.up, adapter.change], grad)
    weights = (part["default"].weight for part in (theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector))
    for one, reference in zip(found, torch.autograd.grad(expected, [x, *weights], grad), strict=True):
        torch.testing.assert_close(one, reference.view_as(one), rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


def test_outputs_and_gradients_are_the_papers(sample: Any, filled: Any) -> None:
    adapter = made(sample, filled)
    weight, bias = sample.module.weight.detach(), sample.module.bias
    ours, x = sample.x.clone().requires_grad_(), sample.x.clone().requires_grad_()
    expected = sample.run(x, formula(adapter, weight))
    actual = sample.adapted(adapter, ours)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (bias is None) == (sample.module.bias is None)
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(actual, [ours, *adapter.parameters()], grad)
    for one, reference in zip(found, torch.autograd.grad(expected, [x, *adapter.parameters()], grad), strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_are_those_of_the_whole_weight(sample: Any, filled: Any, dtype: torch.dtype) -> None:
    sample.module.to(dtype)
    adapter = made(sample, filled)
    dense = updated(adapter, sample.module.weight.detach().float()).flatten(1).norm(dim=1)
    norms = adapter.norms(sample.module)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, dense, rtol=1e-5 if dtype == torch.float32 else 3e-3, atol=0)


def test_weights_in_other_orders_of_memory_and_dtypes_are_read(sample_of: Any) -> None:
    conv = nn.Conv2d(6, 10, 3)
    rows = torch.randn(RANK, 6, 3, 3)
    products, squares = row_products(conv, rows), row_squares(conv)
    torch.testing.assert_close(products, rows.flatten(1) @ conv.weight.flatten(1).T)
    torch.testing.assert_close(squares, conv.weight.flatten(1).square().sum(1))
    last: Any = conv.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(row_products(last, rows), products)
    small = nn.Linear(6, 10).requires_grad_(False)
    expected = small.weight.to(torch.float8_e4m3fn).float()
    small.weight.data = small.weight.data.to(torch.float8_e4m3fn)
    torch.testing.assert_close(row_products(small, rows[:, :, 0, 0]), rows[:, :, 0, 0] @ expected.T)
    torch.testing.assert_close(row_squares(small), expected.square().sum(1))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_are_those_of_finite_differences(kind: str, has_bias: bool) -> None:
    """In float64, the norms being constants."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: Any = (
            nn.Linear(5, 4, has_bias) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=has_bias)
        )
        base = base.double().requires_grad_(False)
        x = torch.randn((2, 3, 5) if kind == "linear" else (2, 4, 3, 3), dtype=torch.float64, requires_grad=True)
        adapter: Any = DoRA(rank=2).build(Layer.of("layer", base), "layer", 0, base).double()
        factors = [torch.randn_like(p).requires_grad_() for p in adapter.parameters()]
    y = base(x).detach().requires_grad_()
    norms = row_norms(adapter.squares, row_products(base, factors[0]), factors[:2], 0.7)

    def adapted(x: Tensor, y: Tensor, *factors: Tensor) -> Tensor:
        lengths = adapter.squares.sqrt()
        return decomposed(x, y, base.bias, adapter.operation, factors, scale=0.7, norms=norms, lengths=lengths)  # pyright: ignore

    assert torch.autograd.gradcheck(adapted, (x, y, *factors))


def test_what_is_kept_for_the_backward_pass_is_loras_and_the_layers_output(sample: Any, filled: Any) -> None:
    def kept(adapter: Any) -> int:
        """The bytes of what is kept, each memory once; numbers of one row are left out."""
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.numel() > sample.sizes.n_out:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, y = sample.x.clone().requires_grad_(), sample.module(sample.x).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            adapter(x, y, sample.module.bias, sample.module)
        return sum(found.values())

    lora = filled(LoRA(rank=RANK).build(sample.sizes, "layer", 0))
    assert kept(made(sample, filled)) == kept(lora) + sample.module(sample.x).nbytes


def test_rows_of_zeros_stay_finite_and_learn(sample: Any) -> None:
    sample.module.weight.data[:3] = 0
    adapter = DoRA(rank=RANK).build(sample.sizes, "layer", 0, sample.module)
    plain = sample.module(sample.x)
    assert torch.equal(sample.adapted(adapter), plain)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (sample.adapted(adapter) - 1).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
        optimizer.step()
    assert sample.adapted(adapter).isfinite().all()
    assert all(t.isfinite().all() for t in adapter.file_tensors(torch.float32).values())


def test_the_output_may_be_changed_in_place(sample: Any, filled: Any) -> None:
    adapter = made(sample, filled)
    out = sample.adapted(adapter)
    plain = torch.autograd.grad(out.relu().sum(), list(adapter.parameters()))
    inplace = torch.autograd.grad(sample.adapted(adapter).relu_().sum(), list(adapter.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(inplace, plain, strict=True))


def test_it_starts_as_the_lora_of_the_same_seed(sample: Any) -> None:
    lora = LoRA(rank=RANK).build(sample.sizes, "layer", 5)
    dora = DoRA(rank=RANK).build(sample.sizes, "layer", 5, sample.module)
    assert torch.equal(dora.down, lora.down) and not dora.up.any() and not dora.change.any()
    torch.testing.assert_close(dora.magnitudes(), sample.module.weight.detach().flatten(1).norm(dim=1))


def test_the_file_has_lycoriss_name_and_shape_of_m(sample: Any, filled: Any) -> None:
    adapter = made(sample, filled).to(torch.bfloat16)
    scale = adapter.file_tensors(torch.bfloat16)["dora_scale"]
    assert tuple(scale.shape) == (sample.sizes.n_out, 1, *[1] * len(sample.sizes.kernel))
    assert scale.dtype == torch.float32 and torch.equal(scale.flatten(), adapter.magnitudes())


def test_we_read_pefts_file(sample: Any, filled: Any) -> None:
    if not peft_can(sample):
        pytest.skip("PEFT splits A between groups, and leaves dilation out")
    adapter = made(sample, filled)
    state = peft.get_peft_model_state_dict(peft_layer(sample, adapter))
    names = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    tensors = {key.removeprefix("base_model.model.0."): tensor for key, tensor in state.items()}
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    tensors = {**tensors, "alpha": torch.tensor(ALPHA)}
    back = adapter_from_file(sample.sizes, tensors, sample.module)
    assert back.algorithm == "DoRA" and "lora_magnitude_vector" in tensors
    torch.testing.assert_close(sample.adapted(back), sample.adapted(adapter), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [nn.Conv1d(6, 10, 1), nn.Conv2d(6, 10, 1)], ids=str)
def test_a_kernel_of_one_may_be_stored_as_matrices(module: Any) -> None:
    layer = Layer.of("layer", module)
    tensors = {
        "lora_down.weight": torch.randn(2, 6),
        "lora_up.weight": torch.randn(10, 2),
        "dora_scale": torch.ones(10, 1),
    }
    adapter: Any = adapter_from_file(layer, tensors, module)
    torch.testing.assert_close(adapter.magnitudes(), torch.ones(10))
    assert adapter.file_tensors(torch.float32)["dora_scale"].ndim == module.weight.ndim
