"""Requests as a model reads them: what shares a pass, what shares a batch, and what is wanted of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.errors import UsageError
from streamprune.evaluation.requests import RaggedBatches, Request, Sequences


def request(ids: list[int], count: int = 1) -> Request:
    return Request(np.array(ids, np.uint32), count)


some = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.integers(1, 40)).map(
        lambda pair: request(pair[0], min(pair[1], len(pair[0]) - 1))
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=120, deadline=None)
@given(some, st.integers(1, 200), st.none() | st.integers(1, 40))
def test_every_request_is_answered_from_what_it_reads(requests: list[Request], tokens: int, border: int | None) -> None:
    """Once for each of its tokens, at the position after which it comes, in a row that begins with its own ids."""
    sequences = Sequences(requests, 40, border)
    batches = RaggedBatches(sequences, tokens)
    seen: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    rows = 0
    for number, ids in enumerate(batches):
        rows += len(ids)
        assert ids.numel() <= tokens or len(ids) == 1
        found = batches.wanted(number)
        assert len(found.places) == len(found.tokens) == len(found.requests) > 0
        for place, token, which in zip(*(part.tolist() for part in found), strict=True):
            row, column = ids[place // ids.shape[1]], place % ids.shape[1]
            read = requests[which].ids
            at = len(read) - requests[which].count + len(seen[which]) - 1
            assert column == at and row[: at + 1].tolist() == read[: at + 1].tolist()
            assert border is None or (len(read) - 1 > border) == (ids.shape[1] > border)
            seen[which].append(token)
    assert all(seen[i] == r.ids[-r.count :].tolist() for i, r in enumerate(requests))
    assert rows == len(sequences) and max(map(len, batches)) >= 1
    distinct = {tuple(r.ids[:-1].tolist()) for r in requests}
    alone = [a for a in distinct if not any(a != b and b[: len(a)] == a for b in distinct)]
    assert len(alone) <= len(sequences) <= len(distinct)
    assert border is not None or len(sequences) == len(alone)


def test_the_longest_come_first_and_few_lengths_are_made() -> None:
    lengths = [1, 5, 8, 9, 30, 63, 64, 65, 100, 128, 129, 250, 1000, 1024, 1025]
    sequences = Sequences([request([i, *[7] * length]) for i, length in enumerate(lengths)], 1030)
    assert [len(ids) for ids in sequences.ids] == sorted(lengths, reverse=True)
    padded = dict(zip(map(len, sequences.ids), sequences.padded, strict=True))
    assert padded == {
        1: 8, 5: 8, 8: 8, 9: 16, 30: 32, 63: 64, 64: 64, 65: 72, 100: 104, 128: 128, 129: 144, 250: 256, 1000: 1024,
        1024: 1024, 1025: 1030,
    }  # fmt: skip
    assert all(long <= max(8, length + max(8, length // 8)) for length, long in padded.items())


def test_choices_of_one_token_share_their_context() -> None:
    context = [3, 4, 5, 6]
    sequences = Sequences([request([*context, choice]) for choice in (7, 8, 9, 7)], 40)
    assert len(sequences) == 1 and sequences.readers == [[0, 1, 2, 3]]
    found = RaggedBatches(sequences, 100).wanted(0)
    assert (found.places.tolist(), found.tokens.tolist()) == ([3] * 4, [7, 8, 9, 7])


def test_the_rest_of_a_row_is_a_token_that_was_read() -> None:
    (batch,) = RaggedBatches(Sequences([request([3, 4, 5, 6])], 40), 100)
    assert batch.tolist() == [[3, 4, 5, 5, 5, 5, 5, 5]]


def test_contexts_are_cut_at_their_beginning() -> None:
    sequences = Sequences([request(list(range(10)), 2), request(list(range(5)))], 6)
    assert sequences.truncated == 1
    assert [r.ids.tolist() for r in sequences.requests] == [[3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    with pytest.raises(UsageError, match="predicts 7 tokens, more than the 6"):
        Sequences([request(list(range(10)), 7)], 6)
