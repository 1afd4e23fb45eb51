"""Adapters of several layers as one of the layer they are there: the same delta, and the same adapters again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.algorithms import OFT, Algorithm, DoRA, LoHa, LoKr, LoRA
from lorasmith.adapters.base import Layer
from lorasmith.adapters.registry import adapter_from_file
from lorasmith.formats.fused_qkv import Member, joined, parted

ROWS = (6, 6, 6, 12)
ALGORITHMS: dict[str, Algorithm] = {
    "LoRA": LoRA(rank=2, alpha=4.0), "LoHa": LoHa(rank=2, alpha=4.0), "OFT": OFT(rank=2),
    "OFT_limited": OFT(rank=2, alpha=0.02), "DoRA": DoRA(rank=2, alpha=4.0),
}  # fmt: skip
algorithms = pytest.mark.parametrize("name", ALGORITHMS)


def layers() -> list[nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Linear(8, n) for n in ROWS]


def whole_of(bases: list[nn.Linear]) -> nn.Linear:
    whole = nn.Linear(8, sum(ROWS))
    whole.weight.data = torch.cat([base.weight.data for base in bases])
    whole.bias.data = torch.cat([base.bias.data for base in bases])
    return whole


def trained(algorithm: Algorithm, base: nn.Linear, seed: int) -> dict[str, Tensor]:
    adapter: Any = algorithm.build(Layer.of("layer", base), f"layer{seed}", seed, base)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return adapter.file_tensors(torch.float32)


def output(base: nn.Linear, parts: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = base(x)
        return adapter_from_file(Layer.of("layer", base), parts, base)(x, y, base.bias, base) if parts else y


def members_of(name: str, held: tuple[int, ...] = (0, 1, 2, 3)) -> list[Member]:
    return [
        Member(base, trained(ALGORITHMS[name], base, i) if i in held else {}) for i, base in enumerate(layers())
    ]  # fmt: skip


@algorithms
@pytest.mark.parametrize("held", [(0, 1, 2, 3), (1, 3), (2,)])
def test_the_whole_does_what_its_members_do(name: str, held: tuple[int, ...]) -> None:
    members = members_of(name, held)
    bases, x = [member.base for member in members], torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    expected = torch.cat([output(m.base, m.parts, x) for m in members], dim=1)  # pyright: ignore[reportArgumentType]
    whole = joined(members)
    torch.testing.assert_close(output(whole_of(bases), whole, x), expected, atol=1e-5, rtol=1e-4)  # pyright: ignore[reportArgumentType]
    if name in ("LoRA", "LoHa", "DoRA"):
        assert len(whole["lora_down.weight" if "LoHa" not in name else "hada_w1_b"]) == 2 * len(held)


@algorithms
@pytest.mark.parametrize("held", [(0, 1, 2, 3), (1, 3), (2,)])
def test_what_was_joined_comes_apart_as_it_was(name: str, held: tuple[int, ...]) -> None:
    members = members_of(name, held)
    again = parted(joined(members), [Member(member.base) for member in members])
    assert [number for number, parts in enumerate(again) if parts] == list(held)
    for number in held if name != "OFT_limited" else ():
        expected = members[number].parts
        assert again[number].keys() == expected.keys()
        assert all(torch.equal(again[number][part], expected[part]) for part in expected)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    for member, parts in zip(members, again, strict=True):
        base: Any = member.base
        torch.testing.assert_close(output(base, parts, x), output(base, member.parts, x), atol=1e-5, rtol=1e-4)


@algorithms
def test_halves_in_the_other_order_are_put_right(name: str) -> None:
    """As the layer with its rows in that order would be trained."""
    (*_, base) = layers()
    parts = trained(ALGORITHMS[name], base, 0)
    turned = nn.Linear(8, 12)
    turned.weight.data, turned.bias.data = base.weight.data.roll(6, 0), base.bias.data.roll(6, 0)
    whole, x = joined([Member(base, parts)], swapped=True), torch.randn(5, 8)
    torch.testing.assert_close(output(turned, whole, x), output(base, parts, x).roll(6, 1), atol=1e-5, rtol=1e-4)
    (again,) = parted(whole, [Member(base)], swapped=True)
    assert all(torch.equal(again[part], parts[part]) for part in parts)


def test_ranks_and_scales_may_differ() -> None:
    bases = layers()
    algorithms = [LoRA(rank=1, alpha=3.0), LoRA(rank=3, alpha=2.0), LoRA(rank=2), LoRA(rank=2)]
    members = [Member(b, trained(a, b, i)) for i, (a, b) in enumerate(zip(algorithms, bases, strict=True))]
    x = torch.randn(5, 8)
    expected = torch.cat([output(b, m.parts, x) for b, m in zip(bases, members, strict=True)], dim=1)
    whole = joined(members)
    assert float(whole["alpha"]) == len(whole["lora_down.weight"]) == 8
    torch.testing.assert_close(output(whole_of(bases), whole, x), expected, atol=1e-5, rtol=1e-4)
    again = parted(whole, [Member(base) for base in bases])
    found = torch.cat([output(b, parts, x) for b, parts in zip(bases, again, strict=True)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@algorithms
def test_a_whole_that_others_trained_is_cut(name: str) -> None:
    """One factor is shared, the other cut."""
    bases, x = layers(), torch.randn(5, 8)
    parts = trained(ALGORITHMS[name], whole_of(bases), 0)
    again = parted(parts, [Member(base) for base in bases])
    found = torch.cat([output(base, own, x) for base, own in zip(bases, again, strict=True)], dim=1)
    torch.testing.assert_close(found, output(whole_of(bases), parts, x), atol=1e-5, rtol=1e-4)


def test_kronecker_products_are_cut_where_they_can_be() -> None:
    bases, x = layers(), torch.randn(5, 8)
    for factor, fits in ((3, False), (2, False), (6, True), (None, True)):
        parts = trained(LoKr(rank=8, factor=factor), whole_of(bases), 0)
        if not fits:
            with pytest.raises(
                ValueError, match=r"lokr_w2, of \d+ rows, must fit into each .* of \[6, 6, 6, 12\] rows"
            ):
                parted(parts, [Member(base) for base in bases])
            continue
        again = parted(parts, [Member(base) for base in bases])
        found = torch.cat([output(base, own, x) for base, own in zip(bases, again, strict=True)], dim=1)
        torch.testing.assert_close(found, output(whole_of(bases), parts, x), atol=1e-5, rtol=1e-4)


def test_new_adapters_come_apart_as_new_ones() -> None:
    bases = layers()
    members = [
        Member(b, LoRA(rank=2).build(Layer.of("", b), f"{i}", 0).file_tensors(torch.float32))
        for i, b in enumerate(bases)
    ]
    again = parted(joined(members), [Member(base) for base in bases])
    for member, parts in zip(members, again, strict=True):
        assert all(torch.equal(parts[part], member.parts[part]) for part in parts) and parts


def test_offsets_are_joined_and_cut() -> None:
    bases = layers()
    members = [Member(base, {"diff_b": torch.full((6,), 2.0)} if i == 1 else {}) for i, base in enumerate(bases)]
    whole = joined(members)
    assert whole.keys() == {"diff_b"} and whole["diff_b"].tolist() == [0.0] * 6 + [2.0] * 6 + [0.0] * 18
    assert [parts["diff_b"].unique().tolist() for parts in parted(whole, members)] == [[0.0], [2.0], [0.0], [0.0]]
    members[0] = Member(nn.Linear(8, 6, bias=False))
    with pytest.raises(ValueError, match="diff_b must hold rows for each part of a layer, but one has no bias"):
        joined(members)


def test_what_cannot_become_one_is_said() -> None:
    bases = layers()
    kronecker = [Member(base, trained(LoKr(rank=2, factor=2), base, 0)) for base in bases]
    with pytest.raises(ValueError, match="Kronecker products of several layers make no Kronecker product"):
        joined(kronecker)
    mixed = [Member(bases[0], trained(LoRA(rank=2), bases[0], 0)), Member(bases[1], trained(OFT(rank=2), bases[1], 0))]
    with pytest.raises(ValueError, match="adapters must be of one algorithm to become one, got LoRA and OFT"):
        joined(mixed)
    uneven = [Member(bases[0], trained(OFT(rank=2), bases[0], 0)), Member(nn.Linear(8, 5))]
    with pytest.raises(ValueError, match=r"OFT's blocks must be of one size .* for \[6, 5\] outputs"):
        joined(uneven)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lora_down.weight": (2, 8), "lora_up.weight": (29, 2)}, r"lora_up.weight must have the shape \[30, 2\], got"),
        ({"lora_down.weight": (2, 8)}, "lora_up.weight is missing beside lora_down.weight"),
        ({"oft_blocks": (7, 4, 4)}, r"oft_blocks must make 30|oft_blocks of 4 must fit into each of the layers"),
        ({"lora_mid.weight": (2, 2)}, "lora_mid.weight is not read"),
        ({"lora_down.weight": (2, 8), "lora_up.weight": (30, 2), "lora_mid.weight": (1,)}, "_mid.weight is not read"),
        ({"diff": (29, 8)}, r"diff must have 30 rows, got \[29, 8\]"),
        ({"lokr_w1": (2, 2), "lokr_w2": ()}, "lokr_w2, of 0 rows, must fit"),
        ({"lora_down.weight": (2, 8), "lora_up.weight": (30, 2), "dora_scale": (1, 8)}, "dora_scale must have 30 rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_said(parts: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parted({name: torch.ones(shape) for name, shape in parts.items()}, [Member(base) for base in layers()])
    with pytest.raises(ValueError, match="lora_up.weight must have an even number of rows"):
        parted({"lora_up.weight": torch.ones(3, 1)}, [Member(nn.Linear(2, 3))], swapped=True)
