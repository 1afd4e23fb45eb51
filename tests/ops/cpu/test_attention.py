"""Our own attention against its formula in float64, and beside PyTorch's."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorasmith.ops.cpu import attention
from lorasmith.ops.cpu.attention import attended, fast_attention, kept_results
from lorasmith.ops.cpu.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no AVX-512 for bf16, or no compiler")
SHAPES = [
    (1, 2, 64, 64, 40), (2, 3, 100, 77, 40), (1, 2, 33, 7, 80), (1, 2, 130, 77, 160), (1, 1, 300, 300, 16),
    (1, 2, 31, 129, 256), (3, 1, 1, 1, 1), (1, 2, 290, 600, 33), (1, 1, 140, 4200, 128),
]  # fmt: skip


@pytest.fixture(autouse=True, params=["best", "vectors"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By what the processor is best at, and by vectors where that is tiles."""
    if request.param == "best":
        yield
        return
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("vectors are the best")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(params=[1, 2, 3], ids="{}_threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-6))


def tensors(shape: tuple[int, ...], logits: float = 1.0) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result, [B,H,…,D] in memory as [B,…,H,D]; the logits' size."""
    batch, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(batch, n, heads, width, generator=generator).bfloat16().transpose(1, 2)
        for n in (queries, keys, keys, queries)
    )
    return [q * logits, k, v, grad]


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each query's sum of exponentials, in float64."""
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    return torch.softmax(logits, -1) @ v.double(), torch.logsumexp(logits, -1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("logits", [1, 8, 100])
def test_results_are_as_exact_as_pytorchs(shape: tuple[int, ...], logits: float, threads: None) -> None:
    q, k, v, _ = tensors(shape, logits)
    right, logarithm = exact(q, k, v)
    plain = F.scaled_dot_product_attention(q, k, v)
    out, lse = attended(q, k, v, q.shape[-1] ** -0.5)
    assert error(out, right) <= 1.4 * error(plain, right) < 0.004
    torch.testing.assert_close(lse.double(), logarithm, rtol=1e-6, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("logits", [1, 20])
def test_gradients_are_as_exact_as_pytorchs(shape: tuple[int, ...], logits: float, threads: None) -> None:
    *inputs, grad = tensors(shape, logits)
    leaves = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(exact(*leaves)[0], leaves, grad.double())
    q, k, v = leaves = [t.requires_grad_() for t in inputs]
    plain = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), leaves, grad)
    before = F.scaled_dot_product_attention
    with fast_attention():
        assert F.scaled_dot_product_attention is not before
        ours = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), leaves, grad)
    assert F.scaled_dot_product_attention is before
    for own, pytorchs, right in zip(ours, plain, expected, strict=True):
        assert error(own, right) <= 1.4 * error(pytorchs, right) < 0.02


def test_any_layout_gives_the_same() -> None:
    *inputs, grad = tensors((2, 3, 50, 77, 24))
    layouts = (
        torch.Tensor.contiguous,
        lambda t: t.mT.contiguous().mT,
        lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    )
    expected = None
    for layout in layouts:
        q, k, v = leaves = [layout(t).detach().requires_grad_() for t in inputs]
        with fast_attention():
            out = F.scaled_dot_product_attention(q, k, v)
            found = [out, *torch.autograd.grad(out, leaves, layout(grad))]
        expected = expected or found
        assert all(map(torch.equal, found, expected))


def test_logits_that_rise_from_key_to_key_do_not_overflow() -> None:
    """Every block of keys then raises what exponentials are taken above."""
    q, v = torch.ones(1, 1, 40, 16).bfloat16(), tensors((1, 1, 1, 1000, 16))[2]
    k = torch.linspace(-300, 300, 1000).bfloat16()[:, None].expand(1, 1, 1000, 16)
    for order in (k, k.flip(2)):
        right, logarithm = exact(q, order, v)
        out, lse = attended(q, order, v, 16**-0.5)
        assert error(out, right) < 0.004
        torch.testing.assert_close(lse.double(), logarithm, rtol=1e-6, atol=0)


def test_what_is_not_finite_stays_so_in_its_own_query() -> None:
    q, k, v, _ = tensors((1, 2, 70, 100, 40))
    q[0, 1, 35, 3] = float("nan")
    out, lse = attended(q, k, v, 0.1)
    bad = torch.zeros(1, 2, 70, dtype=torch.bool)
    bad[0, 1, 35] = True
    assert torch.equal(out.isnan(), bad[..., None].expand_as(out)) and torch.equal(lse.isnan(), bad)


def test_it_also_runs_where_nobody_trains_and_leaves_the_rest_to_pytorch() -> None:
    q, k, v, _ = tensors((1, 2, 40, 50, 24))
    mask = torch.ones(40, 50, dtype=torch.bool).tril()
    with torch.inference_mode(), fast_attention():
        ours = F.scaled_dot_product_attention(q, k, v)
        others = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            F.scaled_dot_product_attention(q, k, v, scale=-0.5),
            F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
        ]
    assert torch.equal(ours, attended(q, k, v, 24**-0.5)[0])
    plain = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        F.scaled_dot_product_attention(q, k, v, scale=-0.5),
        F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
    ]
    assert all(map(torch.equal, others, plain))


def block(x: Tensor) -> Tensor:
    """Two attentions."""
    for _ in range(2):
        x = x + 2 * F.scaled_dot_product_attention(x, x * 0.9, x + 1)
    return x


def test_a_checkpoints_second_run_takes_the_results_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(attention, "attended", lambda *inputs: calls.append(1) or attended(*inputs))
    (x, *_, grad) = tensors((2, 2, 40, 40, 32))
    found = []
    for run in (block, partial(checkpoint, block, use_reentrant=False, context_fn=kept_results)):
        calls.clear()
        leaf = x.clone().requires_grad_()
        with fast_attention():
            y = run(run(leaf))
            y.backward(grad)
        assert leaf.grad is not None and len(calls) == 4
        found.append((y, leaf.grad))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))
