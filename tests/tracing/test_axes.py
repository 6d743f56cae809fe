"""The algebra of axes, without any tensor."""

from __future__ import annotations

import pytest
import torch

from prunelab.tracing.axes import (
    concatenation,
    find,
    freeze,
    is_frozen,
    leaf,
    leaves,
    product,
    regroup,
    show,
    split,
    unify,
)
from prunelab.tracing.groups import unit_map


def test_a_leaf_becomes_what_it_meets():
    axis, heads, width = leaf(12), leaf(3), leaf(4)
    unify(axis, product([heads, width]), "test")
    assert show(axis) == "3×4"
    assert [find(part) for part in leaves(axis)] == [heads, width]


def test_products_align_their_factors():
    first, second = product([leaf(6), leaf(4)]), product([leaf(2), leaf(12)])
    unify(first, second, "test")
    assert show(first) == show(second) == "2×3×4"


def test_sums_align_their_breakpoints():
    first, second = concatenation([leaf(6), leaf(4)]), concatenation([leaf(2), leaf(8)])
    unify(first, second, "test")
    assert show(first) == show(second) == "2+4+4"


def test_a_sum_of_equal_segments_that_meets_a_product_has_equal_segments():
    queries, keys, values = leaf(12), leaf(12), leaf(12)
    heads, width = leaf(3), leaf(4)
    unify(concatenation([queries, keys, values]), product([leaf(3), heads, width]), "test")
    assert list(leaves(queries)) == list(leaves(keys)) == list(leaves(values)) == [heads, width]


def test_what_does_not_line_up_is_frozen_with_the_reason():
    first, second = concatenation([leaf(5), leaf(7)]), product([leaf(3), leaf(4)])
    unify(first, second, "`view` in `encoder`")
    assert is_frozen(first) and is_frozen(second)
    assert "`view` in `encoder`" in next(leaves(second)).frozen


def test_freezing_reaches_everything_that_was_unified():
    first, second, third = leaf(4), leaf(4), leaf(4)
    unify(first, second, "test")
    unify(second, third, "test")
    freeze(third, "the model's output")
    assert next(leaves(first)).frozen == "the model's output"


def test_a_frozen_axis_freezes_what_it_meets_later():
    frozen, free = leaf(4, "the model's input"), leaf(4)
    unify(free, frozen, "test")
    assert next(leaves(free)).frozen == "the model's input"


def test_splitting_and_joining_again_gives_the_same_axis():
    axis = leaf(10)
    parts = split(axis, [3, 3, 4], "test")
    unify(concatenation(parts), axis, "test")
    assert show(axis) == "3+3+4" and not is_frozen(axis)


def test_a_view_and_its_inverse_give_the_same_axes():
    batch, channels = leaf(2, "batch"), leaf(12)
    viewed = regroup([batch, channels], [2, 3, 4], "test")
    again = regroup(viewed, [2, 12], "test")
    assert show(channels) == "3×4"
    assert [find(part) for part in leaves(again[1])] == [find(part) for part in leaves(channels)]


def test_a_view_that_cuts_across_factors_freezes_them():
    first, second = leaf(6), leaf(4)
    out = regroup([first, second], [8, 3], "`view` in `mix`")
    assert is_frozen(first) and is_frozen(second) and all(is_frozen(axis) for axis in out)


def test_every_entry_of_a_product_belongs_to_one_unit_of_each_factor():
    heads, width = leaf(2), leaf(3)
    axis = concatenation([product([heads, width]), product([heads, width])])
    assert unit_map(axis, heads).tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert unit_map(axis, width).tolist() == [0, 1, 2] * 4
    assert unit_map(concatenation([leaf(2), heads]), heads).tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_regroup_agrees_with_a_view_of_real_numbers(seed: int):
    """A unit of a leaf owns the same entries before and after a view: numbers tell which."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(size) for size in torch.randint(1, 5, (4,), generator=generator)]
    shape = [sizes[0] * sizes[1], sizes[2], sizes[3]] if seed % 2 else [sizes[0], sizes[1] * sizes[2] * sizes[3]]
    axes = [leaf(size) for size in sizes]
    numbers = torch.arange(int(torch.tensor(sizes).prod())).view(sizes)
    viewed = regroup(axes, shape, "test")
    for place, axis in enumerate(axes):
        for unit in range(axis.size if axis.frozen is None else 0):
            wanted = set(numbers.select(place, unit).flatten().tolist())
            found = set()
            for new, part in enumerate(viewed):
                owned = (unit_map(part, axis) == unit).nonzero().flatten()
                if any(find(deep) is axis for deep in leaves(part)):
                    found |= set(numbers.view(shape).index_select(new, owned).flatten().tolist())
            assert found == wanted
