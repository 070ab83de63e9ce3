"""Claims about windows of a text: every row once an epoch, in an order that can be gone back to and shared."""

import jax
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.train.windows import Windows, held_out

TEXT = np.arange(100, dtype=np.uint16)


def rows(windows, count):
    return [next(windows).tokens for _ in range(count)]


def test_every_row_comes_once_an_epoch_in_another_order_each():
    windows = Windows(TEXT, 10, 2)
    first, second = (np.concatenate(rows(windows, 5)) for _ in range(2))
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), TEXT)
    assert not np.array_equal(first, second)


def test_a_restored_state_gives_the_same_batches():
    windows = Windows(TEXT, 10, 3)
    rows(windows, 4)
    state, expected = windows.get_state(), rows(windows, 4)
    other = Windows(TEXT, 10, 3)
    other.set_state(state)
    for mine, right in zip(rows(other, 4), expected, strict=True):
        np.testing.assert_array_equal(mine, right)


def test_shares_of_a_batch_make_it_up():
    whole = next(Windows(TEXT, 10, 4))
    parts = [next(Windows(TEXT, 10, 4, share=share, shares=2)) for share in range(2)]
    for right, *mine in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
        np.testing.assert_array_equal(np.concatenate(mine), right)


def test_held_out_batches_are_in_order_and_at_least_one():
    np.testing.assert_array_equal(np.concatenate([b.tokens for b in held_out(TEXT, 10, 2, 45)]).ravel(), TEXT[:40])
    assert len(held_out(TEXT, 10, 2, 1)) == 1


def test_too_little_text_is_refused():
    with pytest.raises(BadInput, match="the text has 100 tokens; allowed: at least 120, one batch"):
        Windows(TEXT, 60, 2)
