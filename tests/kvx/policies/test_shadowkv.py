"""Claims about ShadowKV (2024): what its factors, landmarks and outliers are, and a whole run beside a numpy oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.policies import shadowkv
from kvx.stores.dense import Dense
from kvx.stores.shadow import Shadow, factors, likeness
from tests import tiny
from tests.kvx.policies.direct import context, evidence, softmax, tokens

STEPS = 20
HYPER = {"rank": 24, "chunk": 4, "outliers": 3, "local": 2}


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=2)


def test_the_error_of_the_factors_is_the_energy_of_the_tail_and_u_is_orthonormal():
    keys = tokens(2, 40, dim=8).keys
    matrix = np.swapaxes(np.asarray(keys[0]), 0, 1).reshape(40, 16)
    sizes = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    for rank in (1, 5, 16):
        left, basis = factors(keys, jnp.ones((1, 2, 40), bool), rank)
        assert left.shape == (1, 40, rank) and basis.shape == (1, 2, rank, 8)
        product = np.einsum("sr,grd->gsd", left[0], basis[0])
        error = np.sum((product - np.asarray(keys[0])) ** 2)
        assert error == pytest.approx(np.sum(sizes[rank:] ** 2), rel=1e-4, abs=1e-8)
        np.testing.assert_allclose(left[0].T @ left[0], np.eye(rank), atol=1e-5)


def test_padding_has_no_part_in_the_factors():
    """Junk beyond a row's end changes nothing, and its own rows are zero."""
    keys, present = tokens(2, 40, dim=8).keys, jnp.arange(40) < 25
    left, basis = factors(keys, jnp.broadcast_to(present, (1, 2, 40)), 6)
    junk, other = factors(keys.at[:, :, 25:].set(1e3), jnp.broadcast_to(present, (1, 2, 40)), 6)
    short, own = factors(keys[:, :, :25], jnp.ones((1, 2, 25), bool), 6)
    np.testing.assert_array_equal(left, junk)
    np.testing.assert_array_equal(left[:, 25:], 0)
    wanted = np.einsum("bsr,bgrd->bgsd", short, own)
    np.testing.assert_allclose(np.einsum("bsr,bgrd->bgsd", left[:, :25], basis), wanted, atol=1e-4)
    np.testing.assert_allclose(np.einsum("bsr,bgrd->bgsd", junk[:, :25], other), wanted, atol=1e-4)


def test_a_chunk_is_as_good_as_its_worst_key():
    same = np.tile([3.0, 4.0], (4, 1))
    # The mean of (1, 0) and (0, 1), twice each, is at 45 degrees to all of them.
    split = np.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    # Three alike and one against them: the mean still points along the three.
    against = np.asarray([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    keys = jnp.asarray(np.stack([same, split, against, np.zeros((4, 2))])[None, None], jnp.float32)
    found = likeness(keys, jnp.mean(keys, axis=3))[0, 0]
    np.testing.assert_allclose(found, [1.0, np.sqrt(0.5), -1.0, 0.0], atol=1e-6)


def packed(length: int, budget: int, heads: int = 2, **changes) -> Shadow:
    """One row of random tokens behind the policy's stage."""
    (stage,) = shadowkv(budget, **{**HYPER, "rank": 8, **changes}).stages
    some, where = tokens(heads, length, rotated=False), context(length, heads=heads)
    return stage.pack(some, some.present, length + where.spec.room, evidence(length), where)


def chunks_of(positions: np.ndarray) -> set[int]:
    return {int(position) // 4 for position in positions if position >= 0}


@pytest.mark.slow
def test_outliers_local_tokens_and_chosen_chunks_are_disjoint_and_every_position_is_there_once():
    length = 4 * 13 + 3
    store = packed(length, budget=16)
    places, exact = np.asarray(store.places)[0], np.asarray(store.exact.slots)[0]
    for head in range(2):
        # 13 whole chunks, 2 of them local with the 3 tokens after them; 3 of the other 11 are outliers.
        chunks, kept_exactly = places[head][places[head] >= 0], exact[head][exact[head] >= 0]
        assert sorted([*chunks, *kept_exactly]) == list(range(length))
        assert set(range(44, length)) <= set(kept_exactly.tolist()) and len(kept_exactly) == 3 * 4 + 11
        assert np.asarray(store.chunks)[0, head].tolist() == sorted(chunks_of(chunks))
    worst = likeness(*_chunked(tokens(2, length, rotated=False), 11))[0]
    for head in range(2):
        outliers = chunks_of(exact[head]) & set(range(11))
        assert outliers == set(np.argsort(worst[head], kind="stable")[:3].tolist())


def _chunked(some, count: int):
    keys = some.with_form(rotated=True).keys[:, :, : count * 4].reshape(1, 2, count, 4, -1)
    return keys, jnp.mean(keys, axis=3)


@pytest.mark.slow
def test_chunks_of_identical_keys_are_never_outliers_before_others():
    """Keys at rest (frequencies aside, position 0 for all): chunk 2 of equal keys stays in the table."""
    keys = np.random.default_rng(3).normal(size=(1, 40, 8))
    some = tokens(1, 40, keys=keys)
    # Rotated keys of one chunk made equal; the store is given them unrotated.
    equal = some.keys.at[:, :, 8:12].set(some.keys[:, :, 8:9])
    some = type(some)(equal, some.values, some.positions, some.rotary).with_form(rotated=False)
    (stage,) = shadowkv(8, rank=8, chunk=4, outliers=6, local=1).stages
    store = stage.pack(some, some.present, 56, evidence(40), context(40))
    assert 2 in np.asarray(store.chunks)[0, 0].tolist() and store.chunks.shape == (1, 1, 3)


@pytest.mark.slow
def test_a_prompt_that_its_exact_parts_and_budget_hold_is_a_dense_store():
    assert isinstance(packed(4 * 5 + 3 + 16, budget=16), Dense)
    assert isinstance(packed(4 * 6 + 16, budget=16), Shadow)


class Oracle:
    """One prompt and tokens after it in float64: everything is recomputed at every step, nothing is kept but keys."""

    def __init__(self, model, prompt: np.ndarray, budget: int, rank: int, chunk: int, outliers: int, local: int):
        self.model, self.budget, self.chunk = model, budget // chunk, chunk
        self.length, self.layers = len(prompt), []
        x = model.embed(jnp.asarray(prompt[None]))
        causal = np.tril(np.ones((len(prompt), len(prompt)), bool))
        for block in model.blocks:
            q, raw, v = self._project(block, x)
            k = self._rotate(block, raw, np.arange(len(prompt)))
            logits = np.einsum("grtd,gsd->grts", self._rotate(block, q, np.arange(len(prompt))), k) * block.spec.scale
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", softmax(np.where(causal, logits, -np.inf)), v))
            self.layers.append(self._layer(block, raw, k, v, rank, outliers, local))

    def _layer(self, block, raw, k, v, rank: int, outliers: int, local: int) -> dict:
        heads, length, dim = raw.shape
        matrix = np.swapaxes(raw, 0, 1).reshape(length, -1)
        left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
        low = ((left[:, :rank] * sizes[:rank]) @ right[:rank]).reshape(length, heads, dim)
        low = self._rotate(block, np.swapaxes(low, 0, 1), np.arange(length))
        count = max(length // self.chunk - local, 0)
        shape = (heads, count, self.chunk, dim)
        chunks = k[:, : count * self.chunk].reshape(shape)
        means = chunks.mean(axis=2)
        cosines = np.einsum("gncd,gnd->gnc", chunks, means)
        cosines /= np.linalg.norm(chunks, axis=-1) * np.linalg.norm(means, axis=-1)[..., None]
        order = np.argsort(cosines.min(axis=2), axis=1, kind="stable")
        rest = [sorted(order[head, outliers:].tolist()) for head in range(heads)]
        return {"keys": k, "values": v, "low": low, "means": means, "rest": rest}

    def step(self, token: int) -> tuple[np.ndarray, list]:
        """Logits after one more token, and the chunks that each layer and head chose."""
        x, chosen = self.model.embed(jnp.asarray([[token]], jnp.int32)), []
        for block, layer in zip(self.model.blocks, self.layers, strict=True):
            q, raw, v = self._project(block, x)
            at = np.asarray([layer["keys"].shape[1]])
            layer["keys"] = np.concatenate([layer["keys"], self._rotate(block, raw, at)], axis=1)
            layer["values"] = np.concatenate([layer["values"], v], axis=1)
            q = self._rotate(block, q, at)[:, :, 0]
            out, here = [], []
            for head in range(len(q)):
                keys, rest = layer["keys"][head].copy(), layer["rest"][head]
                picked = rest
                if len(rest) > self.budget:
                    scores = softmax(q[head] @ layer["means"][head][rest].T * block.spec.scale).max(axis=0)
                    picked = [rest[place] for place in np.argsort(-scores, kind="stable")[: self.budget]]
                    keys[: self.length] = np.where(
                        np.isin(np.arange(self.length) // self.chunk, rest)[:, None],
                        layer["low"][head],
                        keys[: self.length],
                    )
                index = np.arange(len(keys)) // self.chunk
                seen = ~np.isin(index, sorted(set(rest) - set(picked))) | (np.arange(len(keys)) >= self.length)
                weights = softmax(np.where(seen, q[head] @ keys.T * block.spec.scale, -np.inf))
                out.append(weights @ layer["values"][head])
                here.append(set(picked))
            x = self._finish(block, x, np.stack(out)[:, :, None])
            chosen.append(here)
        return np.asarray(self.model.unembed(x))[0, -1], chosen

    def _project(self, block, x):
        q, k, v = (np.asarray(array, np.float64)[0] for array in block.project(x))
        q = np.transpose(q, (1, 0, 2)).reshape(block.spec.kv_heads, block.spec.group, len(q), -1)
        return q, np.swapaxes(k, 0, 1), np.swapaxes(v, 0, 1)

    def _rotate(self, block, array, positions):
        return np.asarray(block.rotary(jnp.asarray(array, jnp.float32), jnp.asarray(positions)), np.float64)

    def _finish(self, block, x, out):
        heads = np.transpose(out, (2, 0, 1, 3)).reshape(1, out.shape[2], block.spec.heads, -1)
        return block.finish(x, jnp.asarray(heads, jnp.float32))


@pytest.mark.sampled
@pytest.mark.parametrize("length", [90, 40])
def test_a_whole_run_equals_the_oracle(model, length):
    """Chosen chunks exactly; the shorter prompt's chunks all fit, so that it is the full cache."""
    prompts, lengths = tiny.prompts(90, 40)
    policy = shadowkv(24, **HYPER)
    text = np.random.default_rng(1).integers(0, 97, (2, STEPS)).astype(np.int32)
    row = lengths.tolist().index(length)
    oracle = Oracle(model, prompts[row, :length], 24, **HYPER)
    _, cache = kvx.prefill(model, prompts, policy, lengths, max_new_tokens=STEPS)
    for step in range(STEPS):
        logits, cache = kvx.decode_step(model, text[:, step], cache, policy)
        wanted, chosen = oracle.step(int(text[row, step]))
        for store, layer in zip(cache.layers, chosen, strict=True):
            resident, chunks = np.asarray(store.resident)[row], np.asarray(store.chunks)[row]
            for head in range(2):
                found = {int(chunks[head, place]) for place in resident[head] if place >= 0}
                assert found == layer[head], f"step {step}"
        np.testing.assert_allclose(np.asarray(logits)[row], wanted, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [8, 64])
def test_what_stays_between_steps_changes_no_choice_and_only_what_is_missing_is_fetched(model, budget):
    """64 tokens are more chunks than one turn of the loop brings."""
    prompts, _ = tiny.prompts(200)
    policy = shadowkv(budget, rank=64, chunk=2, outliers=2, local=2)
    _, cache = kvx.prefill(model, prompts, policy, max_new_tokens=STEPS)
    before = [np.asarray(store.resident) for store in cache.layers]
    assert all((resident == -1).all() for resident in before)
    stored = 0
    text = np.random.default_rng(1).integers(0, 97, STEPS).astype(np.int32)
    for step in range(STEPS):
        _, cache = kvx.decode_step(model, text[step : step + 1], cache, policy)
        for store, was in zip(cache.layers, before, strict=True):
            now = np.asarray(store.resident)
            for head in range(2):
                old, new = set(was[0, head].tolist()), set(now[0, head].tolist())
                assert len(new) == budget // 2 and -1 not in new
                assert int(store.fetched[0, head]) == len(new - old)
                stays = [place for place in range(budget // 2) if was[0, head, place] in new]
                assert (now[0, head, stays] == was[0, head, stays]).all(), "what stays does not move"
                stored += len(new & old)
            np.testing.assert_allclose(store.keys, _multiplied(store), atol=2e-5)
        before = [np.asarray(store.resident) for store in cache.layers]
        turns = [-(-int(jnp.max(store.fetched)) // 16) for store in cache.layers]
        assert cache.bytes_moved() == sum(turns) * 2 * 16 * 2 * 32 * 4, "heads, chunks a turn, chunk, width, float32"
    assert stored > 0, "some chunk was wanted twice in a row"


def _multiplied(store: Shadow) -> np.ndarray:
    """The resident chunks' keys from the factors, straight from the definition."""
    places = np.asarray(store.chunks)[0][np.arange(2)[:, None], np.asarray(store.resident)[0]]
    rows = (places[..., None] * store.chunk + np.arange(store.chunk)).reshape(2, -1)
    left = np.asarray(store.coefficients)[0].reshape(-1, store.basis.shape[2])
    raw = np.einsum("gnr,grd->gnd", left[rows], np.asarray(store.basis)[0])
    return np.asarray(store.exact.rotary(jnp.asarray(raw, jnp.float32), jnp.asarray(rows)))[None]


def test_values_lie_on_the_host_and_bytes_follow_the_closed_form(model):
    prompts, _ = tiny.prompts(256)
    policy = shadowkv(32, **HYPER)
    start = kvx.prefill(model, prompts, policy, max_new_tokens=STEPS)
    cache = start[1]
    chunks = 256 // 4 - 2
    many, blocks, exact, room = chunks - 3, 8, (3 + 2 + 1) * 4 - 1 + 128, 128
    host = 2 * many * 4 * 32 * 4
    device = chunks * 4 * 24 * 4 + 2 * 24 * 32 * 4  # the factors, of all heads
    device += 2 * (many + blocks * 4) * 32 * 4 + 2 * blocks * 4 * 32 * 4  # landmarks and resident keys, their values
    device += 4 * (2 * (many * 4 + many + blocks + 1) + 1)  # positions, chunks, blocks, fetched; budget
    device += 2 * exact * (2 * 32 * 4 + 4)  # the exact store
    rotary = 16 * 4 + 4
    assert room == int(cache.room)
    assert cache.host_nbytes == 2 * host
    assert cache.nbytes == 2 * (host + device + rotary) + 4 + 4, "and each row's next position, and the room"
    result = kvx.generate(model, prompts, policy=policy, start=start, max_new_tokens=5)
    assert result.cache.host_nbytes == 2 * host, "they are still there after a loop that took the cache over"
    assert 0 < result.cache.bytes_moved() < result.cache.bytes_read() < cache.nbytes
    _, full = kvx.prefill(model, prompts, kvx.policies.full())
    assert full.host_nbytes == 0 and full.bytes_moved() == 0


@pytest.mark.slow
def test_a_row_that_has_ended_keeps_its_chunks(model):
    prompts, lengths = tiny.prompts(120, 110)
    policy = shadowkv(16, **HYPER)
    _, cache = kvx.prefill(model, prompts, policy, lengths, max_new_tokens=STEPS)
    _, cache = kvx.decode_step(model, np.asarray([3, 4]), cache, policy)
    before = [np.asarray(store.resident) for store in cache.layers]
    text = np.random.default_rng(2).integers(0, 97, (2, 6)).astype(np.int32)
    _, cache = kvx.prefill(model, text, policy, np.asarray([6, 1]), cache)
    after = [np.asarray(store.resident) for store in cache.layers]
    alone = [np.asarray(store.fetched)[1] for store in cache.layers]
    assert all((count == 0).all() for count in alone)
    assert any((one[0] != other[0]).any() for one, other in zip(before, after, strict=True))


@pytest.mark.slow
def test_positions_are_those_of_the_tokens_that_a_selection_kept(model):
    """After SnapKV a head's chunks hold what it kept; rotation is at true positions: at full rank nothing changes."""
    prompts, lengths = tiny.prompts(120, 90)
    text = np.random.default_rng(1).integers(0, 97, (2, STEPS)).astype(np.int32)
    selection = kvx.policies.snapkv(60, window=8)
    both = kvx.chain(selection, shadowkv(24, rank=64, chunk=4, outliers=2, local=1))
    scores, positions = [], []
    for policy in (selection, both):
        logits, cache = kvx.prefill(model, prompts, policy, lengths, max_new_tokens=STEPS)
        positions.append([np.sort(np.asarray(store.positions()))[..., -60:] for store in cache.layers])
        keys = [np.asarray(store.dense()[0]) for store in cache.layers]
        held = [np.asarray(store.positions()) for store in cache.layers]
        scores.append(
            {
                (i, r, g, int(p)): keys[i][r, g, s]
                for i, at in enumerate(held)
                for (r, g, s), p in np.ndenumerate(at)
                if p >= 0
            }
        )
    np.testing.assert_array_equal(*positions)
    assert scores[0].keys() == scores[1].keys()
    for place, key in scores[0].items():
        np.testing.assert_allclose(scores[1][place], key, atol=5e-5)
    logits, cache = kvx.prefill(model, prompts, both, lengths, max_new_tokens=STEPS)
    found, cache = kvx.teacher_forced(model, text, cache, both, logits)
    assert np.isfinite(np.asarray(found)).all()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"budget": 4}, "budget=4 is smaller than one chunk; allowed: at least chunk=8"),
        ({"budget": 64, "rank": 0}, "rank=0 is out of range"),
        ({"budget": 64, "chunk": 0}, "chunk=0 is out of range"),
        ({"budget": 64, "outliers": -1}, "outliers=-1 is out of range"),
        ({"budget": 64, "local": -1}, "local=-1 is out of range"),
        ({"budget": 0.0}, "budget=0.0 is out of range"),
    ],
)
def test_impossible_hyperparameters_are_refused_when_the_policy_is_built(parameters, sentence):
    with pytest.raises(kvx.BadInput, match=sentence):
        shadowkv(**parameters)


def test_a_rank_beyond_the_keys_channels_is_refused_before_any_work(model):
    prompts, _ = tiny.prompts(90)
    with pytest.raises(kvx.BadInput, match="rank=65 is more than the 64 key channels of the model's 2 KV heads"):
        kvx.prefill(model, prompts, shadowkv(16, rank=65))


def test_a_selection_that_acts_at_every_step_cannot_precede_it():
    with pytest.raises(kvx.BadInput, match="cannot evict at every step"):
        kvx.chain(kvx.policies.h2o(64), shadowkv(16))
