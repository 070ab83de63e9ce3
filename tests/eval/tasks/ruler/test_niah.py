"""Claims about RULER's needles: literal prompts, counts of needles, no collisions, depths that cover the text."""

import re
from collections import Counter

import numpy as np
import pytest
from scipy.stats import kstest

from kvx.eval.tasks import registry
from kvx.eval.tasks.ruler.niah import DEPTHS, NEEDLES
from kvx.eval.tasks.source import spread
from tests.eval.tasks.ruler.pieces import source

EVERY = pytest.mark.parametrize("name", NEEDLES)
NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def make(name, length=2048, count=2, seed=0):
    return registry.find(f"ruler/{name}").make(source(), length, count, seed)


def pairs(sample):
    """Keys and values of all needles in a context."""
    return re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.(?:\s|$)", sample.context)


def test_one_value_is_asked_for_in_the_singular():
    (sample,) = make("niah_single_1", count=1)
    (question,) = sample.questions
    ((key, value),) = pairs(sample)
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\nThe grass is green."
    )
    assert f"\nOne of the special magic numbers for {key} is: {value}.\n" in sample.context
    assert question.text == f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    assert question.prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert question.answers == (value,) and question.new_tokens == 128


def test_several_values_are_asked_for_in_the_plural():
    (sample,) = make("niah_multiquery", count=1)
    (question,) = sample.questions
    by_value = {value: key for key, value in pairs(sample)}
    first, second, third, fourth = (by_value[value] for value in question.answers)
    asked = f"the special magic numbers for {first}, {second}, {third}, and {fourth} mentioned in the provided text"
    assert sample.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    assert question.text == f"\nWhat are all {asked}?" and question.prefix == f" T{asked[1:]} are"


@EVERY
def test_each_key_has_its_number_of_needles_and_no_key_or_value_comes_twice(name):
    needles = NEEDLES[name]
    for sample in make(name):
        counts = Counter(key for key, _ in pairs(sample))
        assert set(counts.values()) == {needles.values}
        assert len(counts) > 20 if needles.haystack == "needle" else len(counts) == needles.keys
        values = [value for _, value in pairs(sample)]
        assert len(set(values)) == len(values) and not set(values) & set(counts)


@EVERY
def test_keys_and_values_are_of_their_kinds(name):
    needles = NEEDLES[name]
    for sample in make(name):
        for key, value in pairs(sample):
            assert re.fullmatch(UUID, key) if needles.key == "uuids" else re.fullmatch(r"\w[\w ]*-[\w -]+", key)
            assert re.fullmatch({"uuids": UUID, "numbers": NUMBER}[needles.value], value)


def test_the_published_settings():
    settings = {
        name: (each.haystack, each.key, each.value, each.keys, each.values, each.queries)
        for name, each in NEEDLES.items()
    }
    assert settings == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_1", "niah_multikey_2", "niah_multivalue"])
def test_answers_lie_at_depths_that_cover_the_text(name):
    samples = make(name, 4096, count=12)
    depths = np.asarray([sample.depth for sample in samples])
    # Prose: one of 40 percentages, then the nearest sentence's end; lines: the nearest line.
    np.testing.assert_allclose(depths, [spread(index, 12) for index in range(12)], atol=0.05)
    # ... and so they do as places in the text.
    places = [sample.evidence[0][0] / len(sample.context) for sample in samples]
    np.testing.assert_allclose(places, depths, atol=0.05)


def test_the_other_needles_lie_anywhere():
    samples = make("niah_multivalue", count=24)
    places = np.asarray([[first / len(sample.context) for first, _ in sample.evidence] for sample in samples])
    assert kstest(places[:, 1:].ravel(), "uniform").pvalue > 0.01
    assert np.mean(places[:, 0] < places[:, 1]) == pytest.approx(0.5, abs=0.2)


def test_there_are_forty_depths_from_the_first_word_to_the_last():
    assert len(set(DEPTHS)) == 40 and DEPTHS[0] == 0 and DEPTHS[-1] == 1
    assert set(np.diff(np.round(DEPTHS * 100))) == {2, 3}
    samples = sorted(make("niah_single_2", 1024, count=40), key=lambda sample: sample.depth)
    assert samples[0].evidence[0][0] == samples[0].context.index("\n") + 1
    assert samples[-1].evidence[0][1] == len(samples[-1].context)


def test_needles_stand_between_sentences_or_at_the_end():
    for sample in make("niah_multikey_1", count=5):
        for match in re.finditer(r"One of the special magic .+? is: \d+\.", sample.context):
            before = sample.context[: match.start()].rstrip()
            assert re.search(r"[.!?]['\")]?$", before) or match.end() == len(sample.context)
