"""Prompts made to fit as their suites did it: the middle cut out, the end cut off, fewer examples, or not at all."""

from collections.abc import Callable
from dataclasses import replace

from kvx.errors import BadInput
from kvx.eval.tasks.sample import Sample
from kvx.eval.tasks.source import Source


def without_middle(source: Source, sample: Sample, length: int, task: str) -> Sample:
    """The first and the last half of a prompt that is too long (LongBench, LongBench v2, InfiniteBench).

    The halves are of tokens, of context and question together; each is decoded, and both are joined without a mark.
    What the frame adds is not of the halves, but counts. Decoding and encoding again may change the number of tokens at
    the joint; the halves shrink until the whole fits.

    Args:
        sample: of one question.
        length: tokens of the prompt at most.
        task: named in a refusal.

    Raises:
        BadInput: there is no room for one token of each half.
    """
    if source.size(sample) <= length:
        return sample
    encode, decode = source.tokenizer.encode, source.tokenizer.decode
    (question,) = sample.questions
    context, asked = (encode(text, add_special=False) for text in (sample.context, question.text))
    total = len(context) + len(asked)
    least = source.size(replace(sample, context="", questions=(replace(question, text=""),)))
    room = min(length - least, total - 1)
    while room >= 2:
        half = room // 2
        tail = total - half
        text = question.text
        if tail > len(context):  # the question alone is longer than its half
            text = decode(asked[: max(half - len(context), 0)]) + decode(asked[tail - len(context) :])
        cut = replace(sample, context=decode(context[:half]) + decode(context[tail:]))
        cut = replace(cut, questions=(replace(question, text=text),))
        if (excess := source.size(cut) - length) <= 0:
            return cut
        room -= excess
    raise BadInput(f"length={length} is too short for task={task}; allowed: at least {least + 2}")


def beginning(source: Source, text: str, build: Callable[[int], Sample], length: int, task: str) -> Sample:
    """A prompt whose text is cut at its end, by tokens, until it fits (LongMemEval).

    Args:
        text: what is cut.
        build: the sample of so many of its characters.
        length: tokens of the prompt at most.
        task: named in a refusal.

    Raises:
        BadInput: no token of the text fits.
    """
    whole = build(len(text))
    if source.size(whole) <= length:
        return whole
    ids = source.tokenizer.encode(text, add_special=False)
    least = source.size(build(0))
    room = min(length - least, len(ids) - 1)
    while room >= 1:
        # Characters, not the decoded text: what is kept is a true beginning, and places in it stay where they were.
        cut = build(len(source.tokenizer.decode(ids[:room])))
        if (excess := source.size(cut) - length) <= 0:
            return cut
        room -= excess
    raise BadInput(f"length={length} is too short for task={task}; allowed: at least {least + 1}")


def fewer_examples(source: Source, build: Callable[[int], Sample], most: int, length: int, task: str) -> Sample:
    """A prompt with as many of its first examples as fit, one at least (MMLU, GSM8K).

    Args:
        build: the sample with so many examples.
        most: examples to begin with.
        length: tokens of the prompt at most.
        task: named in a refusal.

    Raises:
        BadInput: one example does not fit.
    """
    for count in range(most, 0, -1):
        if source.size(sample := build(count)) <= length:
            return sample
    least = source.size(build(1))
    raise BadInput(f"length={length} is too short for task={task}; allowed: at least {least}, for one example")


def whole(source: Source, sample: Sample, length: int, where: str) -> Sample:
    """A prompt that fits as it is.

    Raises:
        BadInput: it does not; named by where its record stands.
    """
    if (size := source.size(sample)) > length:
        raise BadInput(f"{where} makes a prompt of {size} tokens with length={length}; allowed: a length that holds it")
    return sample
