"""The layout of features: every text once, calls that are nearly full, segments that cover the calls."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_dist.data.rows import Ints
from agnews_dist.features import layout as layout_module
from agnews_dist.features.layout import Layout, assign_owners, lay_out, order_longest_first, pack_calls
from agnews_dist.model.packed import cut_by_size

ROW_BYTES = 1536


def random_lengths(num: int, dtype: type = np.int64) -> Ints:
    return np.random.default_rng(num).integers(1, 200, num).astype(dtype)


def news_lengths(num: int) -> Ints:
    """Return lengths that are spread like those of AG News: mean 44."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(42), 0.35, num), 8, 128).astype(np.int64)


def check_layout(
    layout: Layout, lengths_U: Ints, rows_U: Ints, groups: list[Ints], *, call_tokens: int, row_bytes: int
) -> None:
    computed, *copied = groups
    num_computed = len(computed)
    assert sorted(layout.order[:num_computed].tolist()) == sorted(computed.tolist()), "the computed texts come first"
    assert layout.order[num_computed:].tolist() == [number for ids in copied for number in ids.tolist()], "in their order"
    assert layout.texts_S[0] == layout.bounds_S[0] == 0
    assert layout.texts_S[-1] == len(layout.order)
    assert layout.num_rows == rows_U[layout.order].sum()
    borders = set(np.cumsum([len(ids) for ids in groups]).tolist())
    for segment, (begin, end) in enumerate(pairwise(layout.texts_S.tolist())):
        numbers = layout.texts(segment)
        assert numbers.tolist() == layout.order[begin:end].tolist()
        assert len(numbers) > 0
        assert not borders & set(range(begin + 1, end)), "a segment has texts of two groups"
        num_rows = int(rows_U[numbers].sum())
        assert layout.bounds_S[segment + 1] - layout.bounds_S[segment] == num_rows
        # The calls are found again from the order alone.
        num_calls = len(cut_by_size(lengths_U[numbers], call_tokens))
        assert num_calls == 1 or num_rows * row_bytes <= layout_module.SEGMENT_BYTES


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=3),
    call_tokens=st.integers(1, 2000),
    row_bytes=st.sampled_from([2, ROW_BYTES, 10**6, 10**9]),
    one_row_per_text=st.booleans(),
    num_segments=st.sampled_from([1, layout_module.NUM_SEGMENTS]),
)
def test_lay_out_keeps_its_contract_for_any_input(
    lengths: list[int], cuts: list[int], call_tokens: int, row_bytes: int, one_row_per_text: bool, num_segments: int
) -> None:
    lengths_U = np.array(lengths, np.int64)
    rows_U = np.ones_like(lengths_U) if one_row_per_text else lengths_U
    order = np.random.default_rng(len(lengths)).permutation(len(lengths))
    groups = np.split(order, sorted(min(cut, len(order)) for cut in cuts))
    sizes = {"call_tokens": call_tokens, "row_bytes": row_bytes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "NUM_SEGMENTS", num_segments)
        layout = lay_out(lengths_U, rows_U, computed=groups[0], copied=groups[1:], **sizes)
    check_layout(layout, lengths_U, rows_U, groups, **sizes)


@settings(deadline=None, max_examples=150)
@given(lengths=st.lists(st.integers(1, 300), max_size=80), limit=st.integers(1, 700))
def test_pack_calls_takes_the_longest_text_that_fits(lengths: list[int], limit: int) -> None:
    lengths_N = np.array(lengths, np.int64)
    left = sorted(lengths)
    seen: list[int] = []
    for ids in pack_calls(lengths_N, limit):
        room = limit
        for number, length in enumerate(lengths_N[ids].tolist()):
            assert length == (max(each for each in left if each <= room) if number else left[-1])
            left.remove(length)
            room -= length
        assert not [each for each in left if each <= room], "a call ends although a text fits"
        seen += ids.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    # So the calls can be found again from their order.
    order = np.array(seen, np.int64)
    calls = [order[begin:end].tolist() for begin, end in cut_by_size(lengths_N[order], limit)]
    assert calls == [ids.tolist() for ids in pack_calls(lengths_N, limit)]


def test_pack_calls_fills_calls_of_real_lengths() -> None:
    """All calls are computed at their full size, so what they leave empty costs time."""
    lengths_N = news_lengths(2500)
    assert lengths_N.sum() / (512 * len(pack_calls(lengths_N, 512))) > 0.985
    in_order = cut_by_size(lengths_N[order_longest_first(lengths_N)], 512)
    assert lengths_N.sum() / (512 * len(in_order)) < 0.96, "control: texts in order of length leave more"


def test_lay_out_cuts_small_files_into_256_segments_and_large_ones_into_64_mib() -> None:
    lengths_U = random_lengths(4000)
    computed = np.arange(4000)
    small = lay_out(lengths_U, lengths_U, computed=computed, call_tokens=300, row_bytes=ROW_BYTES)
    assert 256 <= small.num_segments <= 2 * 256
    large = lay_out(lengths_U, lengths_U, computed=computed, call_tokens=300, row_bytes=ROW_BYTES * 50)
    sizes = np.diff(large.bounds_S) * ROW_BYTES * 50
    assert large.num_segments > 400
    assert sizes.max() <= 64 << 20
    assert sizes[:-1].min() > (64 << 20) - 300 * ROW_BYTES * 50, "no segment has room for the next call"
    huge_rows = lay_out(lengths_U, lengths_U, computed=computed, call_tokens=300, row_bytes=1 << 30)
    assert huge_rows.num_segments == len(pack_calls(lengths_U, 300)), "a segment has at least one call"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_layout_does_not_overflow_narrow_integers(dtype: type) -> None:
    narrow_N = random_lengths(3000, dtype)
    assert int(narrow_N.astype(int).sum()) > np.iinfo(np.uint16).max
    assert assign_owners(narrow_N, 3).tolist() == assign_owners(narrow_N.astype(np.int64), 3).tolist()


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
