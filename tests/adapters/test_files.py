"""What a file's tensors must be to make an adapter, and what is said where they are not."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorasmith.adapters.base import Adapter, Layer
from lorasmith.adapters.registry import ADAPTERS, adapter_from_file

BASES = nn.Linear(24, 30), nn.Conv2d(24, 30, 3)
LINEAR, CONV = (Layer.of("layer", base) for base in BASES)
FILES = {
    "LoRA": {"lora_down.weight": (4, 24), "lora_up.weight": (30, 4)},
    "LoHa": {"hada_w1_a": (30, 4), "hada_w1_b": (4, 24), "hada_w2_a": (30, 4), "hada_w2_b": (4, 24)},
    "LoKr": {"lokr_w1": (5, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)},
    "LoKr_whole": {"lokr_w1": (5, 4), "lokr_w2": (6, 6)},
    "LoKr_of_four": {"lokr_w1_a": (5, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)},
    "OFT": {"oft_blocks": (10, 3, 3)},
    "DoRA": {"dora_scale": (30, 1), "lora_down.weight": (4, 24), "lora_up.weight": (30, 4)},
    "DoRA_of_PEFT": {"lora_magnitude_vector": (30,), "lora_down.weight": (4, 24), "lora_up.weight": (30, 4)},
}


def ones(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {suffix: torch.ones(shape) for suffix, shape in shapes.items()}


def read(tensors: dict[str, Tensor]) -> Adapter:
    return adapter_from_file(LINEAR, tensors, BASES[0])


@pytest.mark.parametrize("name", FILES)
def test_without_alpha_the_scale_is_one(name: str) -> None:
    adapter: Any = read(ones(FILES[name]))
    if adapter.alpha is None:
        assert name in ("OFT", "LoKr_whole")
    else:
        assert adapter.alpha / adapter.rank == 1


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name in FILES for suffix in FILES[name]])
def test_a_missing_factor_is_named(name: str, suffix: str) -> None:
    tensors = ones(FILES[name])
    del tensors[suffix]
    if suffix in ("dora_scale", "lora_magnitude_vector"):
        assert read(tensors).algorithm == "LoRA"
        return
    missing = {"lokr_w1": "lokr_w1_a", "lokr_w2": "lokr_w2_a", "oft_blocks": ""}.get(suffix, suffix)
    message = f"{missing} is missing beside {sorted(tensors)[0]}" if missing else "(is|are) not read"
    with pytest.raises(ValueError, match=message):
        read(tensors)


@pytest.mark.parametrize(
    ("name", "suffix", "shape", "message"),
    [
        ("LoRA", "lora_down.weight", (4, 23), r"lora_down.weight must have the shape \[4, 24\], got \[4, 23\]"),
        ("LoRA", "lora_up.weight", (30, 5), r"lora_up.weight must have the shape \[30, 4\], got \[30, 5\]"),
        ("LoHa", "hada_w1_a", (31, 4), r"hada_w1_a must have the shape \[30, 4\], got \[31, 4\]"),
        ("LoHa", "hada_w1_b", (5, 24), r"hada_w1_b must have the shape \[4, 24\], got \[5, 24\]"),
        ("LoHa", "hada_w2_b", (4, 24, 1), r"hada_w2_b must have the shape \[4, 24\], got \[4, 24, 1\]"),
        ("LoKr", "lokr_w1", (4, 5), r"lokr_w1 and lokr_w2 must make a weight of \[30, 24\], got \[24, 30\]"),
        ("LoKr", "lokr_w2_b", (3, 6), r"lokr_w2_b must have the shape \[2, 6\], got \[3, 6\]"),
        ("LoKr", "lokr_w1", (20,), r"lokr_w1 must have the shape \[20, 1\], got \[20\]"),
        ("LoKr_whole", "lokr_w2", (6, 6, 1), r"lokr_w2 must have the shape \[6, 6\], got \[6, 6, 1\]"),
        ("DoRA", "dora_scale", (30,), r"dora_scale must have the shape \[30, 1\], got \[30\]"),
        ("DoRA", "dora_scale", (31, 1), r"dora_scale must have the shape \[30, 1\], got \[31, 1\]"),
        ("DoRA", "dora_scale", (1, 24, 1), r"dora_scale must have the shape \[1, 24\], got \[1, 24, 1\]"),
        ("DoRA", "lora_magnitude_vector", (30,), "dora_scale must not stand beside lora_magnitude_vector"),
        ("DoRA_of_PEFT", "lora_magnitude_vector", (1, 30), r"lora_magnitude_vector must have the shape \[30\], got"),
        ("OFT", "oft_blocks", (9, 3, 3), r"oft_blocks must have the shape \[10, 3, 3\], got \[9, 3, 3\]"),
        ("OFT", "oft_blocks", (4, 7, 7), r"oft_blocks must make 30 outputs, got \[4, 7, 7\]"),
        ("OFT", "oft_blocks", (2, 10, 3, 3), r"^oft_blocks \(of BOFT, as it has 4 axes\) is not read$"),
    ],
)
def test_a_wrong_shape_is_named(name: str, suffix: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(ones({**FILES[name], suffix: shape}))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *((name, "dora_scale") for name in FILES if "LoRA" not in name and "DoRA" not in name),
        ("DoRA", "lora_mid.weight"),
        ("LoRA", "lora_mid.weight"),
        ("LoHa", "hada_t1"),
        ("LoKr", "lokr_t2"),
        ("OFT", "rescale"),
        ("LoRA", "lokr_w1"),
    ],
)
def test_a_tensor_that_nothing_here_uses_is_named(name: str, suffix: str) -> None:
    with pytest.raises(ValueError, match=f"{suffix} .*is not read"):
        read({**ones(FILES[name]), suffix: torch.ones(1)})


def test_alpha_alone_makes_no_adapter() -> None:
    with pytest.raises(ValueError, match="alpha is not read"):
        read({"alpha": torch.tensor(1.0)})


def test_a_factor_beside_the_whole_it_would_make_is_named() -> None:
    with pytest.raises(ValueError, match="lokr_w2_a, lokr_w2_b must not stand beside lokr_w1, lokr_w2"):
        read(ones({**FILES["LoKr"], "lokr_w2": (6, 6)}))


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan")), torch.tensor(-float("inf"))], ids=str)
@pytest.mark.parametrize("name", sorted(FILES.keys() - {"LoKr_whole"}))
def test_alpha_must_be_one_finite_number(name: str, alpha: Tensor) -> None:
    with pytest.raises(ValueError, match="alpha must be one finite number, got"):
        read({**ones(FILES[name]), "alpha": alpha})


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 9999999999.0, -3.0, 0.0])
def test_the_alpha_of_two_whole_kronecker_factors_does_not_matter(alpha: float) -> None:
    """Where both are whole, nothing is scaled: w1 (x) w2 is the delta."""
    tensors: dict[str, Tensor] = {suffix: torch.randn(shape) for suffix, shape in FILES["LoKr_whole"].items()}
    adapter: Any = read({**tensors, "alpha": torch.tensor(alpha)})
    expected = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    torch.testing.assert_close(adapter.merged(torch.zeros(30, 24)), expected)
    assert adapter.alpha is None and adapter.file_tensors(torch.float32)["alpha"].isfinite()


def test_an_infinite_limit_of_a_rotation_is_none() -> None:
    blocks = torch.randn(10, 3, 3)
    adapters = [read({"oft_blocks": blocks, "alpha": torch.tensor(alpha)}) for alpha in (float("inf"), 0.0)]
    assert torch.equal(*(adapter.merged(torch.eye(30, 24)) for adapter in adapters)) and adapters[0].alpha is None


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_down.weight must not be empty, got \[0, 24\]"):
        read(ones({"lora_down.weight": (0, 24), "lora_up.weight": (30, 0)}))


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name in FILES for suffix in FILES[name]])
def test_numbers_must_be_finite_and_real(name: str, suffix: str) -> None:
    tensors = ones(FILES[name])
    tensors[suffix].view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"{suffix} must be finite, got NaN or infinity"):
        read(tensors)
    with pytest.raises(ValueError, match=f"{suffix} must hold floating-point numbers, got torch.int64"):
        read({**tensors, suffix: torch.ones(FILES[name][suffix], dtype=torch.int64)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_any_floating_point_dtype_is_read(dtype: torch.dtype) -> None:
    tensors = {suffix: tensor.to(dtype) for suffix, tensor in ones(FILES["LoRA"]).items()}
    assert {p.dtype for p in read(tensors).parameters()} == {dtype}


SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 10, 24, 30]), max_size=5).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ADAPTERS), st.data())
def test_any_shapes_make_an_adapter_that_runs_or_a_value_error(kind: Any, data: st.DataObject) -> None:
    suffixes = sorted(kind.SUFFIXES)
    shapes = data.draw(st.dictionaries(st.sampled_from(suffixes), SIZES, min_size=1))
    inputs = torch.ones(2, 24), torch.ones(1, 24, 3, 3)
    outputs = torch.ones(2, 30), torch.ones(1, 30, 1, 1)
    for layer, base, x, y in zip((LINEAR, CONV), BASES, inputs, outputs, strict=True):
        try:
            adapter: Any = adapter_from_file(layer, ones(shapes), base)
        except ValueError:
            continue
        assert adapter(x, y, None, base).shape == y.shape
