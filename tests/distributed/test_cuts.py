"""Tensors cut among ranks: each element once, at borders or blocks, near-equal. Needs no MPI."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("mpi4py")

from rmsprop_gpu.distributed.cuts import cut
from rmsprop_gpu.kernels.norms import BLOCK

SIZES = st.lists(
    st.one_of(
        st.integers(0, 10),
        st.integers(0, 5 * BLOCK),
        st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK, 1_000_003]),
    ),
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 7))
@example([], 3, 2)
@example([0, 0], 4, 1)
@example([5], 9, 7)
@example([BLOCK * 12], 3, 2)
@example([0, BLOCK, 0, BLOCK, 0], 2, 1)
def test_each_element_is_in_one_slice(sizes, ranks, buckets):
    made = cut(sizes, ranks, buckets)
    assert len(made) == buckets
    assert [len(bucket.pieces) for bucket in made] == [ranks] * buckets
    total, slices, seen = sum(sizes), ranks * buckets, [0] * len(sizes)
    begins, lengths = [], []  # of the slices, in the range of all elements
    at = 0
    for bucket in made:
        for pieces in bucket.pieces:
            begins.append(at)
            length = 0
            for piece in pieces:  # in order, contiguous
                assert 0 <= piece.start < piece.stop <= sizes[piece.tensor]
                assert piece.start == seen[piece.tensor]
                assert all(seen[i] == sizes[i] for i in range(piece.tensor))
                assert piece.at == length
                assert piece.start % BLOCK == 0  # so each partial sum is on one rank
                assert piece.stop % BLOCK == 0 or piece.stop == sizes[piece.tensor]
                seen[piece.tensor] = piece.stop
                length += piece.stop - piece.start
            lengths.append(length)
            at += length
        assert bucket.length == max(lengths[-ranks:])  # padded to the longest slice, and no further
    assert seen == sizes
    # Near-equal: each slice begins at the last possible place before its share.
    for i, begin in enumerate(begins):
        assert begin == last_place(sizes, i * total // slices)
    assert all(length < total / slices + BLOCK + 1 for length in lengths)


def last_place(sizes, at):
    """The last border of a tensor, or of a block in one, at or before this position."""
    start, places = 0, [0]
    for size in sizes:
        if start <= at:
            places.append(start + min(at - start, size) // BLOCK * BLOCK)
        start += size
        places += [start] * (start <= at)
    return max(places)


def test_cuts_at_borders_of_small_tensors():
    (bucket,) = cut([100, 100, 100, 100], 3, 1)
    assert [[(p.tensor, p.start, p.stop) for p in pieces] for pieces in bucket.pieces] == [
        [(0, 0, 100)],
        [(1, 0, 100)],
        [(2, 0, 100), (3, 0, 100)],
    ]
    assert bucket.length == 200


def test_cuts_at_blocks_of_large_ones():
    first, second = cut([10 * BLOCK + 1], 2, 2)
    spans = [(p.start // BLOCK, p.stop / BLOCK) for b in (first, second) for pieces in b.pieces for p in pieces]
    assert spans == [(0, 2), (2, 5), (5, 7), (7, 10 + 1 / BLOCK)]
