"""Packed rows of documents as an iterator of batches that can say where it is, and go back there.

Documents in an order by the seed, anew every epoch, are tokenised, laid end to end, and cut into rows: no padding, and
no attention from one to another. Every process walks the same stream and takes its own rows of each batch. So a run
does not depend on how many processes share it, it may go on with another number of them, and there is one state to
keep; the price is that each process tokenises all, which pre-tokenised files avoid.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from kvx.errors import BadInput
from kvx.train.batch import Batch
from kvx.train.data.encoding import Encoding

TOKENISING = grain.ReadOptions(num_threads=min(4, os.cpu_count() or 1), prefetch_buffer_size=16)
"""Threads that work ahead, since the `tokenizers` package does so outside Python's lock."""

READING = grain.ReadOptions(num_threads=0)
"""Of what is token ids already there is nothing to do ahead."""


SAMPLED = 64, 1024
"""Documents that tell one text from another, and how much of each: characters of text, ids of tokens."""


class Stream:
    """A `grain` pipeline's iterator, whose state JSON holds and which refuses that of another text.

    Args:
        pipeline: of this process's batches.
        facts: what makes it the same stream: a state fits only where they are equal.
    """

    def __init__(self, pipeline: grain.IterDataset, facts: dict[str, Any]):
        self._iterator = iter(pipeline)
        self._facts = facts

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """This process's rows of the next batch."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where it is, between two batches, as JSON holds it."""
        return {"facts": self._facts, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go there.

        Raises:
            BadInput: a state of another text, or of other rows.
        """
        for name, mine in self._facts.items():
            if state["facts"].get(name) != mine:
                raise BadInput(
                    f"the data's {name} is {mine!r}, and was {state['facts'].get(name)!r} when the state was kept; "
                    f"allowed: the same text, rows and seed"
                )
        self._iterator.set_state(_tuples(state["iterator"]))


def text_batches(
    documents: Sequence[Any],
    encoding: Encoding,
    *,
    sequence: int,
    batch: int,
    seed: int = 0,
    shuffle: bool = True,
    share: int = 0,
    shares: int = 1,
    epochs: int | None = None,
) -> Stream:
    """Batches of packed rows.

    Args:
        documents: at least one of them not empty.
        encoding: to token ids.
        sequence: tokens of a row.
        batch: rows of a batch, over all processes.
        seed: of the order.
        shuffle: False: documents as they come.
        share, shares: which part of every batch's rows is this process's, and how many parts there are.
        epochs: None: endless. The last batch of a finite stream is filled up with padding.

    Raises:
        BadInput: rows that the processes cannot share evenly.
    """
    if batch % shares:
        raise BadInput(f"batch={batch} over {shares} processes; allowed: a multiple of them")
    encoded = grain.MapDataset.source(_Encoded(documents, encoding))
    if shuffle:
        encoded = encoded.seed(seed).shuffle()
    filled = encoded.repeat(epochs).filter(lambda element: len(element["tokens"]) > 0)
    stream = filled.to_iter_dataset(READING if encoding.tokenizer is None else TOKENISING)
    rows = grain.experimental.ConcatThenSplitIterDataset(stream, length_struct={"tokens": sequence})
    facts = {"documents": len(documents), "text": fingerprint(documents), "sequence": sequence, "batch": batch}
    facts |= {"seed": seed, "shuffle": shuffle}
    return Stream(rows.batch(batch).map(_mine(batch, share, shares)), facts)


def fingerprint(records: Sequence[Any]) -> str:
    """Of documents or preferences, by what some of them begin with and how long they are: cheap for any text."""
    count, characters = SAMPLED
    found = hashlib.sha256()
    for index in sorted({len(records) * part // count for part in range(count)} if len(records) else ()):
        record = records[index]
        if isinstance(record, np.ndarray):
            found.update(f"{len(record)} {record[:characters].tolist()}".encode())
        else:
            text = record if isinstance(record, str) else json.dumps(record)
            found.update(f"{len(text)} {text[:characters]}".encode(errors="surrogatepass"))
    return found.hexdigest()[:16]


def held_out_batches(
    documents: Sequence[Any],
    encoding: Encoding,
    *,
    sequence: int,
    batch: int,
    tokens: int,
    share: int = 0,
    shares: int = 1,
) -> list[Batch]:
    """The first batches of documents as they come, the same at every call.

    Args:
        tokens: to judge by, rounded up to a whole batch; fewer if there is no more text.
    """
    stream = text_batches(
        documents, encoding, sequence=sequence, batch=batch, shuffle=False, share=share, shares=shares, epochs=1
    )
    count = -(-tokens // (batch * sequence))
    return [found for _, found in zip(range(count), stream, strict=False)]


class _Encoded(Sequence[dict[str, np.ndarray]]):
    """Documents as token ids; what is refused is named by its place."""

    def __init__(self, documents: Sequence[Any], encoding: Encoding):
        self._documents, self._encoding = documents, encoding

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            return {"tokens": self._encoding(self._documents[index])}
        except BadInput as error:
            raise BadInput(f"document {index + 1} of {len(self)}: {error}") from None


def _mine(batch: int, share: int, shares: int) -> Callable[[dict[str, np.ndarray]], Batch]:
    """A process's rows of a whole batch, filled up if it is the last of a finite stream."""
    size = batch // shares

    def cut(rows: dict[str, np.ndarray]) -> Batch:
        def part(name: str) -> np.ndarray:
            array = rows[name]
            whole = np.pad(array, ((0, batch - len(array)), (0, 0)))
            return whole[share * size : (share + 1) * size].astype(np.int32)

        segments = part("tokens_segment_ids")
        real = segments > 0
        return Batch(part("tokens"), segments, np.where(real, part("tokens_positions"), -1), real)

    return cut


def _tuples(state: Any) -> Any:
    """Lists of a state that went through JSON as the tuples they were, which its packing compares with."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(map(_tuples, state)) if isinstance(state, list | tuple) else state
