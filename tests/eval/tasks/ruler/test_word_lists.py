"""Claims about the word lists: their kinds and sizes, and a stream without end in which no word comes twice."""

from itertools import islice

import numpy as np

from kvx.eval.tasks.ruler.word_lists import compound, english, shuffled, words


def test_the_lists_are_the_package_s():
    assert {"abacus", "zucchini"} <= set(words("noun"))
    assert {"abrasive", "zany"} <= set(words("adjective")) and {"abide", "write"} <= set(words("verb"))
    assert len(words("noun")) > 6000 and len(english()) > 8000
    assert list(english()) == sorted(set(words("noun") + words("adjective") + words("verb")))
    assert all(word and word == word.strip() for word in english())


def test_a_compound_is_an_adjective_and_a_noun():
    random = np.random.default_rng(0)
    for _ in range(50):
        text = compound(random)
        assert any(
            text[:at] in words("adjective") and text[at + 1 :] in words("noun")
            for at, letter in enumerate(text)
            if letter == "-"
        )


def test_the_stream_gives_all_words_and_then_compounds_and_none_twice():
    count = len(english()) + 500
    found = list(islice(shuffled(np.random.default_rng(0)), count))
    assert len(set(found)) == count
    assert set(found[: len(english())]) == set(english()) and found[:500] != list(english()[:500])
    assert all("-" in word for word in found[len(english()) :])
    assert found != list(islice(shuffled(np.random.default_rng(1)), count))
