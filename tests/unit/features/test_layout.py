"""The layout of a split's features: every text once, calls within the limit and one group, segments that cover the calls."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_dist.data.rows import Ints
from agnews_dist.features import layout as layout_module
from agnews_dist.features.layout import Layout, assign_owners, lay_out, order_longest_first
from agnews_dist.model.packed import cut_by_size

ROW_BYTES = 1536


def random_lengths(num: int, dtype: type = np.int64) -> Ints:
    return np.random.default_rng(num).integers(1, 200, num).astype(dtype)


def cut_into(order: Ints, num_groups: int) -> list[Ints]:
    return [group for group in np.array_split(order, num_groups) if len(group)]


def check_layout(
    layout: Layout, lengths_N: Ints, groups: list[Ints], *, call_tokens: int, row_bytes: int, one_row_per_text: bool
) -> None:
    present = np.concatenate([np.empty(0, np.int64), *groups])
    order = np.concatenate([np.empty(0, np.int64), *layout.texts])
    assert order.tolist() == present.tolist(), "every text of the groups once, in their order"

    rows_of_texts = np.ones(len(lengths_N), int) if one_row_per_text else lengths_N.astype(int)
    assert layout.rows_N[order].tolist() == rows_of_texts[order].tolist()
    begins = np.concatenate([[0], np.cumsum(rows_of_texts[order])])
    assert layout.begin_N[order].tolist() == begins[:-1].tolist(), "end to end in the order computed"
    assert layout.num_rows == begins[-1]
    absent = np.setdiff1d(np.arange(len(lengths_N)), present)
    assert (layout.begin_N[absent] == -1).all()

    group_of = {int(text): number for number, group in enumerate(groups) for text in group}
    tokens = [int(lengths_N[ids].astype(int).sum()) for ids in layout.texts]
    for ids, num_tokens in zip(layout.texts, tokens, strict=True):
        assert len(ids) == 1 or num_tokens <= call_tokens
        assert len({group_of[int(text)] for text in ids}) == 1, "a call crosses the border of two groups"
    for (ids, num_tokens), (next_ids, _) in pairwise(zip(layout.texts, tokens, strict=True)):
        if group_of[int(ids[0])] == group_of[int(next_ids[0])]:
            assert num_tokens + int(lengths_N[next_ids[0]]) > call_tokens, "a call ends although the next text fits"

    assert layout.calls_S[0] == 0
    assert layout.calls_S[-1] == len(layout.texts)
    assert (np.diff(layout.calls_S) >= 1).all()
    assert len(layout.bounds_S) == len(layout.calls_S) == layout.num_segments + 1
    found = [ids for segment in range(layout.num_segments) for ids in layout.calls(segment)]
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in layout.texts]
    for segment in range(layout.num_segments):
        num_rows = sum(int(rows_of_texts[ids].sum()) for ids in layout.calls(segment))
        assert layout.bounds_S[segment + 1] - layout.bounds_S[segment] == num_rows
        assert len(layout.calls(segment)) == 1 or num_rows * row_bytes <= layout_module.SEGMENT_BYTES


@pytest.mark.parametrize("one_row_per_text", [False, True])
@pytest.mark.parametrize("num", [0, 1, 2, 3, 17, 400])
@pytest.mark.parametrize("num_groups", [1, 2, 7])
@pytest.mark.parametrize("call_tokens", [1, 150, 512, 10**6])
def test_lay_out_keeps_its_contract(num: int, num_groups: int, call_tokens: int, one_row_per_text: bool) -> None:
    lengths_N = random_lengths(num)
    groups = cut_into(order_longest_first(lengths_N), num_groups)
    options = {"call_tokens": call_tokens, "row_bytes": ROW_BYTES, "one_row_per_text": one_row_per_text}
    check_layout(lay_out(lengths_N, groups, **options), lengths_N, groups, **options)


def random_groups(lengths: list[int], cuts: list[int]) -> list[Ints]:
    lengths_N = np.array(lengths)
    return [
        group for group in np.split(order_longest_first(lengths_N), sorted(cut % len(lengths) for cut in cuts)) if len(group)
    ]


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 100), max_size=4),
    left_out=st.integers(0, 5),
    call_tokens=st.integers(1, 2000),
    row_bytes=st.sampled_from([2, ROW_BYTES, 10**6, 10**9]),
    one_row_per_text=st.booleans(),
)
def test_lay_out_keeps_its_contract_for_any_input(
    lengths: list[int], cuts: list[int], left_out: int, call_tokens: int, row_bytes: int, one_row_per_text: bool
) -> None:
    groups = random_groups(lengths, cuts)[left_out:]
    lengths_N = np.array(lengths)
    options = {"call_tokens": call_tokens, "row_bytes": row_bytes, "one_row_per_text": one_row_per_text}
    check_layout(lay_out(lengths_N, groups, **options), lengths_N, groups, **options)


def test_lay_out_marks_absent_texts() -> None:
    lengths_N = np.array([3, 9, 1, 4])
    layout = lay_out(lengths_N, [np.array([1, 0])], call_tokens=10, row_bytes=ROW_BYTES)
    assert layout.begin_N.tolist() == [9, 0, -1, -1]
    assert [ids.tolist() for ids in layout.texts] == [[1], [0]]


def test_lay_out_never_mixes_groups_in_a_call() -> None:
    lengths_N = np.array([4, 3, 2, 1])
    layout = lay_out(lengths_N, [np.array([0, 1]), np.array([2, 3])], call_tokens=100, row_bytes=ROW_BYTES)
    assert [ids.tolist() for ids in layout.texts] == [[0, 1], [2, 3]]
    whole = lay_out(lengths_N, [np.arange(4)], call_tokens=100, row_bytes=ROW_BYTES)
    assert [ids.tolist() for ids in whole.texts] == [[0, 1, 2, 3]], "control: one group, one call"


def test_lay_out_cuts_small_splits_into_256_segments_and_large_ones_into_64_mib() -> None:
    lengths_N = random_lengths(4000)
    order = [order_longest_first(lengths_N)]
    small = lay_out(lengths_N, order, call_tokens=300, row_bytes=ROW_BYTES)
    assert len(small.texts) > 1000, "there are more calls than segments"
    assert 256 <= small.num_segments <= 2 * 256
    large = lay_out(lengths_N, order, call_tokens=300, row_bytes=ROW_BYTES * 50)
    sizes = np.diff(large.bounds_S) * ROW_BYTES * 50
    assert large.num_segments > 400
    assert sizes.max() <= 64 << 20
    assert sizes[:-1].min() > (64 << 20) - 300 * ROW_BYTES * 50, "no segment has room for the next call"
    huge_rows = lay_out(lengths_N, order, call_tokens=300, row_bytes=1 << 30)
    assert huge_rows.num_segments == len(huge_rows.texts), "a segment has at least one call"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_lay_out_does_not_overflow_narrow_integers(dtype: type) -> None:
    narrow_N = random_lengths(3000, dtype)
    assert int(narrow_N.astype(int).sum()) > np.iinfo(np.uint16).max
    wide_N = narrow_N.astype(np.int64)
    options = {"call_tokens": 70_000, "row_bytes": ROW_BYTES}
    narrow, wide = (lay_out(lengths, [order_longest_first(lengths)], **options) for lengths in (narrow_N, wide_N))
    check_layout(narrow, wide_N, [order_longest_first(wide_N)], **options, one_row_per_text=False)
    assert narrow.begin_N.tolist() == wide.begin_N.tolist()
    assert assign_owners(narrow_N, 3).tolist() == assign_owners(wide_N, 3).tolist()


def test_order_longest_first_keeps_file_order_among_equal_lengths() -> None:
    assert order_longest_first(np.array([2, 5, 2, 5, 9])).tolist() == [4, 1, 3, 0, 2]


@pytest.mark.parametrize(
    ("lengths", "call_tokens", "bounds"),
    [
        ([], 5, []),
        ([9], 5, [(0, 1)]),
        ([2, 3], 5, [(0, 2)]),
        ([2, 4], 5, [(0, 1), (1, 2)]),
        ([9, 9, 1, 1], 5, [(0, 1), (1, 2), (2, 4)]),
        ([1, 9, 1], 5, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_call_bounds_fill_calls_up_to_the_limit(lengths: list[int], call_tokens: int, bounds: list[tuple[int, int]]) -> None:
    assert cut_by_size(np.array(lengths, dtype=np.int64), call_tokens) == bounds


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num", [0, 1, 5, 997])
def test_assign_owners_spreads_every_length(num: int, num_ranks: int) -> None:
    """In any range of the texts sorted by length, the ranks' numbers of texts differ by at most one."""
    lengths_N = np.random.default_rng(num).integers(1, 40, num)
    owner_N = assign_owners(lengths_N, num_ranks)
    assert owner_N.shape == (num,)
    is_owner_NR = owner_N[order_longest_first(lengths_N), None] == np.arange(num_ranks)
    assert (is_owner_NR.sum(axis=1) == 1).all()
    ends = np.concatenate([np.zeros((1, num_ranks), int), np.cumsum(is_owner_NR, axis=0)])
    generator = np.random.default_rng(0)
    ranges = [(0, num), *(sorted(generator.integers(0, num + 1, 2)) for _ in range(300))]
    for length in set(lengths_N.tolist()):
        of_length = np.flatnonzero(lengths_N[order_longest_first(lengths_N)] == length)
        ranges.append((int(of_length[0]), int(of_length[-1]) + 1))
    for begin, end in ranges:
        counts = ends[end] - ends[begin]
        assert counts.sum() == end - begin
        assert np.ptp(counts) <= 1


def test_assign_owners_differs_from_file_order() -> None:
    """The control: in file order, alternating long and short texts would go to different ranks."""
    lengths_N = np.tile([50, 1], 100)
    long_of_rank = np.bincount(assign_owners(lengths_N, 2)[lengths_N == 50], minlength=2)
    assert long_of_rank.tolist() == [50, 50]
    assert np.bincount((np.arange(200) % 2)[lengths_N == 50], minlength=2).tolist() == [100, 0]
