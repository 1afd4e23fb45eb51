"""Training sizes, and the order of samples: fair, seeded, and a pure function of the step."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lorasmith.data.buckets import bucket_size, fitted
from lorasmith.data.order import Order, classes_by_shape


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ((640, 640), (1024, 1024)),
        ((1024, 1023), (1024, 1024)),
        # The sizes that SDXL was trained at (Podell et al. 2023, appendix I).
        ((1920, 1080), (1344, 768)),
        ((1080, 1920), (768, 1344)),
        ((4000, 3000), (1152, 896)),
        ((3000, 2000), (1216, 832)),
        # 896 x 640 would have the picture's own ratio, but 55 % of the area.
        ((1400, 1000), (1216, 832)),
        ((9000, 100), (2048, 512)),
        ((100, 9000), (512, 2048)),
    ],
)
def test_sizes_at_1024_in_multiples_of_64(picture: tuple[int, int], expected: tuple[int, int]) -> None:
    assert bucket_size(*picture, resolution=1024, multiple=64) == expected


def test_distance_is_a_factor() -> None:
    # 11:5 and 10:6 are 0.2700 and 0.2633 from 1.93, but factors of 1.1399 and 1.1580.
    assert bucket_size(193, 100, resolution=64, multiple=8) == (88, 40)
    assert bucket_size(3, 2, resolution=64, multiple=8) == (80, 48)
    assert bucket_size(2, 3, resolution=64, multiple=8) == (48, 80)


def test_the_resolution_is_rounded_down_and_not_below_a_multiple() -> None:
    assert bucket_size(500, 500, resolution=127, multiple=64) == (64, 64)
    assert bucket_size(5000, 10, resolution=127, multiple=64) == (64, 64)
    with pytest.raises(ValueError, match="^resolution must be at least the model's multiple of 64 pixels, got 63$"):
        bucket_size(500, 500, resolution=63, multiple=64)


SIDES = st.integers(1, 20000)


@settings(max_examples=50, deadline=None)
@given(width=SIDES, height=SIDES, resolution=st.integers(64, 600), multiple=st.sampled_from((8, 16, 32, 64)))
def test_a_size_fills_the_area_with_the_nearest_aspect_ratio(
    width: int, height: int, resolution: int, multiple: int
) -> None:
    found = bucket_size(width, height, resolution, multiple)
    square = resolution // multiple
    wide, high = found[0] // multiple, found[1] // multiple
    assert (wide * multiple, high * multiple) == found and min(wide, high) >= 1
    assert wide * high <= square**2 < max(wide, high) * (min(wide, high) + 1)
    assert bucket_size(height, width, resolution, multiple) == (found[::-1] if width != height else found)

    def error(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    # Every pair of sides of which neither can grow, up to twice the resolution.
    sides = range(1, 2 * square + 1)
    tight = [(w, h) for w in sides for h in sides if w * h <= square**2 < min((w + 1) * h, w * (h + 1))]
    assert error((wide, high)) <= min(map(error, tight)) + 1e-9


def test_a_picture_is_scaled_to_cover_and_cropped_about_its_centre() -> None:
    image = Image.new("RGB", (300, 100), "green")
    image.paste("red", (0, 0, 100, 100))
    image.paste("blue", (200, 0, 300, 100))
    square = fitted(image, (50, 50))
    assert square.size == (50, 50)
    assert square.getpixel((25, 25)) == (0, 128, 0)
    assert np.asarray(square)[..., 1].min() > 100, "green up to the edges"
    wide = fitted(image, (120, 40))
    assert wide.size == (120, 40)
    assert [wide.getpixel((x, 20)) for x in (1, 60, 118)] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    # A checkerboard of single pixels is averaged, not sampled.
    fine = Image.new("L", (64, 64))
    fine.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    assert np.abs(np.asarray(fitted(fine, (8, 8))).astype(int) - 127).max() < 20


def test_classes_by_shape() -> None:
    shapes = [(4, 4), (8, 2), (4, 4), (2, 8)]
    assert classes_by_shape(shapes, [1, 3, 2, 1]) == ((0, 2, 2), (1, 1, 1), (3,))
    with pytest.raises(ValueError, match="shorter"):
        classes_by_shape(shapes, [1, 1])


CLASSES = ((0, 2, 2, 5), (1, 7, 8, 9, 10, 11, 12), (3,))  # index 2 repeats
SIZE = sum(map(len, CLASSES))


@pytest.mark.parametrize("group_size", [1, 2, 3, 16])
def test_a_group_is_of_one_class_and_a_cycle_is_fair(group_size: int) -> None:
    order = Order(3, group_size, CLASSES)
    for cycle in range(3):
        groups = [order.group_at(step) for step in range(cycle * SIZE, (cycle + 1) * SIZE)]
        assert all(len(group) == group_size for group in groups)
        classes = [{number for number, indices in enumerate(CLASSES) if set(group) <= set(indices)} for group in groups]
        assert Counter(map(tuple, classes)) == {(0,): 4, (1,): 7, (2,): 1}
        seen = Counter(index for group in groups for index in group)
        assert seen == {index: group_size * indices.count(index) for indices in CLASSES for index in indices}


@pytest.mark.parametrize("group_size", [1, 2, 3, 5])
def test_at_any_time_a_class_s_samples_are_seen_equally_often(group_size: int) -> None:
    order = Order(11, group_size, CLASSES)
    seen: Counter[int] = Counter()
    for step in range(4 * SIZE):
        seen.update(order.group_at(step))
        counts = [seen[index] for index in CLASSES[1]]
        assert max(counts) - min(counts) <= 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_classes_take_turns_in_proportion_to_their_sizes(seed: int, sizes: list[int]) -> None:
    """The groups of one class stray by less than 1 from the due share, and the step by less than 1 for each class."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    classes = tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))
    order = Order(seed, 1, classes)
    turns: Counter[int] = Counter()
    for step in range(2 * sum(sizes)):
        (index,) = order.group_at(step)
        turns[next(number for number, indices in enumerate(classes) if index in indices)] += 1
        for number, size in enumerate(sizes):
            assert abs(turns[number] - (step + 1) * size / sum(sizes)) < 1 + len(sizes) * size / sum(sizes)


def test_groups_depend_on_seed_and_step_alone() -> None:
    order = Order(5, 2, CLASSES)
    forwards = [order.group_at(step) for step in range(40)]
    assert [Order(5, 2, CLASSES).group_at(step) for step in reversed(range(40))] == forwards[::-1]
    assert Order(5, 2, CLASSES).group_at(10**12) == order.group_at(10**12)


@pytest.mark.parametrize("other", [1, 2**32, 2**33, 2**63])
def test_seeds_differ_in_all_their_bits(other: int) -> None:
    classes = (tuple(range(20)), tuple(range(20, 40)))
    first, second = Order(0, 1, classes), Order(other, 1, classes)
    groups = [first.group_at(step) for step in range(80)], [second.group_at(step) for step in range(80)]
    assert groups[0] != groups[1]
    assert [group[0] < 20 for group in groups[0]] != [group[0] < 20 for group in groups[1]], "turns"
    streams = [[group[0] for group in run if group[0] < 20] for run in groups]
    assert streams[0] != streams[1], "order within a class"


def test_passes_and_classes_have_orders_of_their_own() -> None:
    size = 20
    order = Order(0, size, (tuple(range(size)), tuple(range(size, 2 * size))))
    groups = [order.group_at(step) for step in range(2 * size)]
    passes = {tuple(index % size for index in group) for group in groups}
    assert len(passes) == 2 * size
    assert all(sorted(found) == list(range(size)) for found in passes)


def test_the_order_of_a_seed_never_changes() -> None:
    assert [Order(0, 2, CLASSES).group_at(step) for step in (0, 1, 2, 100)] == [[12, 1], [2, 0], [8, 7], [10, 12]]
