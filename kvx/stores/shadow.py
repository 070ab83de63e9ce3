"""The shadow store: a prompt's keys as a low-rank product, its values on the host, chunks fetched for each query."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.kernels.decode_attention import decode_attention, decode_probabilities
from kvx.kernels.logits import scaled_logits, softmax_rows, visible
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.parts.ranking import top
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stores.base import nbytes
from kvx.stores.dense import Dense
from kvx.stores.host import OnHost
from kvx.stores.slots import scatter
from kvx.tokens import Tokens, concatenate

TURN = 16
"""Chunks a head fetches in one turn of the loop over what is missing: bytes move in such lots."""


@pytree
class Shadow:
    """Exact tokens on the device, and M chunks of c tokens of which K are resident at a time.

    A row's prompt is N chunks and a local rest. The chunks that their mean describes worst are exact from the start
    (outliers), as is the rest and whatever is generated. Of the M others the device holds a landmark each (the mean of
    its rotated keys) and, for all heads together, the factors of the unrotated keys; their values are on the host.

    `fetch` makes the chunks that a query wants resident: keys are multiplied out and rotated to their true positions,
    values come from the host, and only for chunks that are not there yet, in place of those that leave. A head whose
    chunks all fit is resident from the prompt on, with exact keys.

    Slots are shown as the M c ones of the chunks, then those of the exact store.

    Bytes on the host: M c V itemsize a KV head. On the device, beside the exact store: N c r a row and G r D for the
    factors, (M + K c) D + K c V a head, itemsize each, and 4 (M c + M + K + 1) a head and 4 a row for positions and
    counts.

    Attributes:
        coefficients, basis: U and Sigma V^T of the unrotated keys, all KV heads side by side in one row a token. A
            chunk's rows of U are one row here: what is fetched together lies together, in whole lanes on a TPU (with
            r = 160 channels to a row, its compiler turned all of U around at every step).
        values: of the M chunks, a row each.
        places: true positions of their tokens, -1 where there is none.
        chunks: which of the N each of the M is, -1 for none.
        landmarks: of the M.
        resident: which of the M each block holds, -1 for none.
        keys, kept: rotated keys and values of the blocks.
        budget: chunks read per row, at most K.
        fetched: chunks that the last step brought to each head.
        exact: outliers, the local rest and generated tokens.
        chunk: c.
    """

    coefficients: Float[Array, "B N cr"]
    basis: Float[Array, "B G r D"]
    values: OnHost
    places: Int[Array, "B G Mc"]
    chunks: Int[Array, "B G M"]
    landmarks: Float[Array, "B G M D"]
    resident: Int[Array, "B G K"]
    keys: Float[Array, "B G Kc D"]
    kept: Float[Array, "B G Kc V"]
    budget: Int[Array, "B"]
    fetched: Int[Array, "B G"]
    exact: Dense
    chunk: int = static()

    @classmethod
    def pack(
        cls,
        tokens: Tokens,
        mask: Bool[Array, "B G T"],
        capacity: int,
        room: int,
        *,
        chunk: int,
        rank: int,
        outliers: int,
        local: int,
        budget: Int[Array, "B"],
        most: int,
    ) -> "Shadow":
        """The tokens in `mask`, at most `capacity` a head, and `room` for new ones.

        A row of the factored matrix joins the i-th token of every head: the same token, unless a selection kept
        different ones.

        Args:
            budget: chunks to read in each row; `most` bounds it statically.
        """
        kept = tokens.with_form(rotated=False).select(mask, capacity)
        coefficients, basis = factors(kept.keys, kept.present, rank)
        total = capacity // chunk - local
        many = total - outliers
        count = jnp.sum(kept.present, axis=-1)
        owned = jnp.arange(total) < (count // chunk - local)[..., None]
        rotated = kept.with_form(rotated=True)
        keys = _cut(rotated.keys[:, :, : total * chunk], chunk)
        landmarks = jnp.mean(keys.astype(jnp.float32), axis=3)
        outlying = top(-likeness(keys, landmarks), owned, jnp.full(count.shape, outliers))
        others = owned & ~outlying
        order = jnp.argsort(~others, axis=-1, stable=True)[..., :many]
        there = jnp.take_along_axis(others, order, axis=-1)
        inexact = jnp.pad(jnp.repeat(others, chunk, axis=-1), ((0, 0), (0, 0), (0, capacity - total * chunk)))
        slots = _spread(order, chunk)
        moved = rotated.take(slots, jnp.repeat(there, chunk, axis=-1))
        # Where a row's budget holds every chunk of a head, they are resident from the start, as they are.
        fits = (jnp.sum(others, axis=-1) <= budget[:, None])[..., None]
        blocks = min(most, many)
        size = blocks * chunk
        return cls(
            coefficients[:, : total * chunk].reshape(len(mask), total, -1).astype(tokens.keys.dtype),
            basis.astype(tokens.keys.dtype),
            OnHost.put(moved.values.reshape(*mask.shape[:2], many, -1)),
            moved.positions,
            jnp.where(there, order, -1),
            jnp.take_along_axis(landmarks, order[..., None], axis=2).astype(tokens.keys.dtype),
            jnp.where(fits & there[..., :blocks], jnp.arange(blocks), -1),
            moved.keys[:, :, :size],
            moved.values[:, :, :size],
            budget,
            jnp.zeros(count.shape, jnp.int32),
            Dense.pack(replace(rotated, stats={}), kept.present & ~inexact, (outliers + local + 1) * chunk - 1 + room),
            chunk,
        )

    def append(self, tokens: Tokens) -> "Shadow":
        return replace(self, exact=self.exact.append(tokens))

    def scores(self, query: Query) -> Float[Array, "B G M"]:
        """What each chunk is worth to a query; -inf for one that is not there, or wholly out of sight.

        Softmax over the chunks of each query head's logits with the landmarks, summed over queries; the most that any
        head of the group gives.
        """
        spec = query.spec
        logits = scaled_logits(query.rotated, self.landmarks[:, :, None], spec.scale, spec.softcap)
        newest = jnp.max(query.positions, axis=1)
        last = self.places[:, :, self.chunk - 1 :: self.chunk]
        seen = visible(newest[:, None, None, None], last[:, :, None], spec.window)[:, :, 0]
        weights, _ = softmax_rows(jnp.where(seen[:, :, None, None], logits, -jnp.inf))
        asking = (query.positions >= 0)[:, None, None, :, None]
        worth = jnp.max(jnp.sum(jnp.where(asking, weights, 0.0), axis=3), axis=2)
        return jnp.where(seen, worth, -jnp.inf)

    def choose(self, query: Query) -> tuple[Int[Array, "B G K"], Bool[Array, "B G K"]]:
        """The chunks of the highest score, best first (in a tie the earlier), and which of them are read."""
        scores, index = jax.lax.top_k(self.scores(query), self.resident.shape[-1])
        within = jnp.arange(index.shape[-1]) < self.budget[:, None, None]
        return index, within & (scores > -jnp.inf)

    def fetch(self, query: Query) -> "Shadow":
        """With the chunks that the query chooses resident, and no others; a row without a query stays as it is."""
        index, wanted = self.choose(query)
        many, blocks = self.chunks.shape[-1], self.resident.shape[-1]
        asking = jnp.any(query.positions >= 0, axis=1)[:, None, None]
        stay = _member(index, wanted, self.resident, many) | ~asking
        missing = wanted & asking & ~_member(self.resident, self.resident >= 0, index, many)
        count = jnp.sum(missing, axis=-1, dtype=jnp.int32)
        coming = jnp.take_along_axis(index, jnp.argsort(~missing, axis=-1, stable=True), axis=-1)
        free = jnp.argsort(stay & (self.resident >= 0), axis=-1, stable=True)
        # Ascending and distinct, as a scatter in place wants them; those beyond the blocks are dropped.
        target = jnp.where(jnp.arange(blocks) < count[..., None], free, blocks + jnp.arange(blocks))
        resident = scatter(jnp.where(stay, self.resident, -1), target, coming)

        def turn(step: Int[Array, ""], held: tuple[Array, Array]) -> tuple[Array, Array]:
            place = step * TURN + jnp.arange(TURN)
            entries = coming[..., jnp.minimum(place, blocks - 1)]
            goal = jnp.where(place < blocks, target[..., jnp.minimum(place, blocks - 1)], blocks + place)
            values = self.values.fetch(entries).reshape(*goal.shape[:2], -1, self.kept.shape[-1])
            slots = _spread(goal, self.chunk)
            return scatter(held[0], slots, self._rebuilt(entries)), scatter(held[1], slots, values)

        keys, kept = jax.lax.fori_loop(0, _turns(count), turn, (self.keys, self.kept))
        return replace(self, resident=resident, keys=keys, kept=kept, fetched=count)

    def read(self, query: Query) -> Partial:
        """Attention over the exact tokens and the chunks that are resident: `fetch` first."""
        chunks = decode_attention(
            query.rotated, self.keys, self.kept, query.positions, self._resident_places(), **query.masking
        )
        return merge_partials(chunks, self.exact.read(query))

    def probabilities(self, query: Query, lse: Float[Array, "B G R T"]) -> Float[Array, "B G R T C"]:
        found = decode_probabilities(
            query.rotated, self.keys, query.positions, self._resident_places(), lse, **query.masking
        )
        found = jnp.moveaxis(found, -1, 2)
        everything = jnp.zeros((*self.places.shape, *found.shape[3:]), found.dtype)
        chunks = jnp.moveaxis(_put(everything, self._resident_rows(), found), 2, -1)
        return jnp.concatenate([chunks, self.exact.probabilities(query, lse)], axis=-1)

    def tokens(self) -> Tokens:
        every = jnp.broadcast_to(jnp.arange(self.chunks.shape[-1]), self.chunks.shape)
        rows = self._resident_rows()
        keys = _put(self._rebuilt(every), rows, self.keys)
        values = _put(self.values.whole().reshape(*self.places.shape, -1), rows, self.kept)
        return concatenate(Tokens(keys, values, self.places, self.exact.rotary), self.exact.tokens())

    def positions(self) -> Int[Array, "B G C"]:
        return jnp.concatenate([self.places, self.exact.slots], axis=-1)

    def dense(self) -> tuple[Float[Array, "B G C D"], Float[Array, "B G C V"], Int[Array, "B G C"]]:
        tokens = self.tokens()
        return tokens.keys, tokens.values, tokens.positions

    @property
    def stats(self) -> dict[str, Shaped[Array, "B G C"]]:
        return {}

    def bytes_moved(self) -> Int[Array, ""]:
        """Bytes of values that the last step brought from the host: whole turns, of every head."""
        turn = self.fetched.size * TURN * self.chunk * self.kept.shape[-1] * self.kept.dtype.itemsize
        return _turns(self.fetched) * turn

    def bytes_read(self) -> Int[Array, ""]:
        """On the device, what every step touches and the factors of what the last one rebuilt; and what it moved."""
        always = nbytes(self) - nbytes((self.values, self.coefficients, self.basis))
        rebuilt = self.fetched.size * TURN * self.chunk * self.basis.shape[2] * self.basis.dtype.itemsize
        turns = _turns(self.fetched)
        return always + turns * rebuilt + jnp.minimum(turns, 1) * self.basis.nbytes + self.bytes_moved()

    def _rebuilt(self, entries: Int[Array, "B G n"]) -> Float[Array, "B G nc D"]:
        """Rotated keys of some of the M chunks, multiplied out."""
        chunks = jnp.maximum(jnp.take_along_axis(self.chunks, entries, axis=-1), 0)
        factor = self.coefficients[jnp.arange(len(chunks))[:, None, None], chunks]
        factor = factor.reshape(*chunks.shape[:2], -1, self.basis.shape[2])
        raw = jnp.einsum("bgnr,bgrd->bgnd", factor, self.basis, preferred_element_type=jnp.float32)
        places = jnp.take_along_axis(self.places, _spread(entries, self.chunk), axis=-1)
        return self.exact.rotary(raw, places).astype(self.basis.dtype)

    def _resident_rows(self) -> Int[Array, "B G Kc"]:
        """Slot of each resident token; beyond the chunks' slots for a block that is empty."""
        blocks = jnp.arange(self.resident.shape[-1])
        return _spread(jnp.where(self.resident >= 0, self.resident, self.chunks.shape[-1] + blocks), self.chunk)

    def _resident_places(self) -> Int[Array, "B G Kc"]:
        rows, last = self._resident_rows(), self.places.shape[-1] - 1
        return jnp.where(rows <= last, jnp.take_along_axis(self.places, jnp.minimum(rows, last), axis=-1), -1)


def factors(
    keys: Float[Array, "B G S D"], present: Bool[Array, "B G S"], rank: int
) -> tuple[Float[Array, "B S r"], Float[Array, "B G r D"]]:
    """U and Sigma V^T of the best approximation of this rank, in float32; rows of a token are 0 where it is absent.

    The rank is at most min(S, G D), which is exact.
    """
    batch, heads, length, dim = keys.shape
    rows = jnp.where(present[..., None], keys, 0).astype(jnp.float32)
    matrix = jnp.swapaxes(rows, 1, 2).reshape(batch, length, heads * dim)
    left, sizes, right = jnp.linalg.svd(matrix, full_matrices=False)
    basis = (sizes[..., None] * right)[:, :rank].reshape(batch, -1, heads, dim)
    return left[..., :rank] * jnp.any(present, axis=1)[..., None], jnp.swapaxes(basis, 1, 2)


def likeness(keys: Float[Array, "B G N c D"], means: Float[Array, "B G N D"]) -> Float[Array, "B G N"]:
    """The smallest cosine between a chunk's mean and one of its keys: 1 where all are equal."""
    keys = keys.astype(jnp.float32)
    products = jnp.einsum("bgncd,bgnd->bgnc", keys, means)
    sizes = jnp.linalg.norm(keys, axis=-1) * jnp.linalg.norm(means, axis=-1)[..., None]
    return jnp.min(jnp.where(sizes > 0, products / jnp.where(sizes > 0, sizes, 1.0), 0.0), axis=-1)


def _cut(array: Any, chunk: int) -> Any:
    """(B, G, N c, ...) as (B, G, N, c, ...)."""
    return array.reshape(*array.shape[:2], -1, chunk, *array.shape[3:])


def _spread(chunks: Int[Array, "B G n"], chunk: int) -> Int[Array, "B G nc"]:
    """Slots of whole chunks."""
    return (chunks[..., None] * chunk + jnp.arange(chunk)).reshape(*chunks.shape[:2], -1)


def _member(
    these: Int[Array, "B G n"], which: Bool[Array, "B G n"], asked: Int[Array, "B G m"], many: int
) -> Bool[Array, "B G m"]:
    """Whether each number asked is among `these` where `which`; numbers below `many`, -1 is not."""
    batch, heads = jnp.ogrid[: these.shape[0], : these.shape[1]]
    table = jnp.zeros((*these.shape[:2], many), bool)
    table = table.at[batch[..., None], heads[..., None], jnp.where(which, these, many)].set(True, mode="drop")
    return jnp.take_along_axis(table, jnp.maximum(asked, 0), axis=-1) & (asked >= 0)


def _put(array: Any, rows: Int[Array, "B G n"], new: Any) -> Any:
    """Rows overwritten; those beyond the end are dropped."""
    batch, heads = jnp.ogrid[: rows.shape[0], : rows.shape[1]]
    return array.at[batch[..., None], heads[..., None], rows].set(new.astype(array.dtype), mode="drop")


def _turns(count: Int[Array, "B G"]) -> Int[Array, ""]:
    """Turns of the loop over what is missing."""
    return (jnp.max(count) + TURN - 1) // TURN
