"""Claims about exact acceptance, by enumeration of every draft and decision over five symbols, in float64."""

from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.acceptance import accept_chain, accept_child, certain, chances, child_chances, residual, without

SYMBOLS = 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def some_laws(*shape: int, seed: int = 0) -> np.ndarray:
    """Random laws of very different sharpness, some symbols impossible."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(*shape, SYMBOLS)) * random.choice([0.3, 1.0, 4.0], size=(*shape, 1))
    weights = np.exp(logits) * (random.random((*shape, SYMBOLS)) < 0.85)
    weights[..., 0] += 1e-3
    return weights / weights.sum(-1, keepdims=True)


def one_hot(token: int) -> np.ndarray:
    return np.eye(SYMBOLS)[token]


@pytest.mark.parametrize("seed", range(20))
def test_a_drafted_token_has_the_target_law(seed):
    p, q = map(jnp.asarray, some_laws(2, seed=seed))
    stand = np.asarray(chances(jnp.broadcast_to(p, (5, 5)), jnp.broadcast_to(q, (5, 5)), jnp.arange(5)))
    law = q * stand + np.sum(q * (1 - stand)) * np.asarray(residual(p, q))
    assert abs(law - p).max() < 1e-12
    # The chance that a draft stands is 1 - TV(p, q).
    assert abs(np.sum(q * stand) - np.minimum(p, q).sum()) < 1e-12


def test_the_law_of_a_whole_chain_is_the_target_joint_law():
    """Three tokens of a target and a drafter whose laws depend on the tokens before, by every draft and decision."""
    target = {context: some_laws(1, seed=hash_of(context))[0] for context in contexts(2)}
    drafter = {context: some_laws(1, seed=1000 + hash_of(context))[0] for context in contexts(1)}
    emitted = np.zeros((SYMBOLS,) * 3)
    for drafts in product(range(SYMBOLS), repeat=2):
        p = jnp.asarray([[target[()], target[drafts[:1]], target[drafts]]])
        q = jnp.asarray([[drafter[()], drafter[drafts[:1]]]])
        drawn = float(q[0, 0, drafts[0]] * q[0, 1, drafts[1]])
        stand = np.asarray(chances(p[:, :2], q, jnp.asarray([drafts])))[0]
        for first, second in product((True, False), repeat=2):
            # A uniform of 0 accepts whatever can stand, one just below 1 rejects whatever can fall.
            uniforms = jnp.asarray([[0.0 if stands else 1 - 1e-16 for stands in (first, second)]])
            chance = drawn * (stand[0] if first else 1 - stand[0]) * (stand[1] if second else 1 - stand[1])
            if chance == 0:
                continue
            accepted, law = accept_chain(p, q, jnp.asarray([drafts]), uniforms)
            prefix = drafts[: int(accepted[0])]
            assert len(prefix) == (0 if not first else 1 if not second else 2)
            for token, probability in enumerate(np.asarray(law)[0]):
                # What this round leaves open, the target goes on with.
                text = (*prefix, token)
                rest = target[text] if len(text) == 2 else None
                if len(text) == 3:
                    emitted[text] += chance * probability
                elif rest is not None:
                    emitted[text] += chance * probability * rest
                else:
                    for third, then in enumerate(target[text]):
                        emitted[(*text, third)] += chance * probability * then * target[(*text, third)]
    joint = np.zeros_like(emitted)
    for text in contexts(3):
        if len(text) == 3:
            joint[text] = np.prod([target[text[:at]][text[at]] for at in range(3)])
    assert abs(emitted - joint).max() < 1e-12


def contexts(longest: int):
    return [text for length in range(longest + 1) for text in product(range(SYMBOLS), repeat=length)]


def hash_of(text: tuple[int, ...]) -> int:
    return sum((symbol + 1) * 6**at for at, symbol in enumerate(text))


def tree_law(p, children_laws, drawn) -> np.ndarray:
    """The law of what a node emits, over every tuple of children with its probability and laws."""
    emitted = np.zeros(SYMBOLS)
    for children, probability in drawn:
        each, rest = child_chances(jnp.asarray(p), jnp.stack(children_laws(children)), jnp.asarray(children, jnp.int32))
        left = probability
        for child, chance in zip(children, np.asarray(each), strict=True):
            emitted[child] += left * chance
            left *= 1 - chance
        emitted += left * np.asarray(rest)
    return emitted


@pytest.mark.sampled
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_independent_children_are_exact(seed):
    p, q = map(jnp.asarray, some_laws(2, seed=seed))
    drawn = [(children, np.prod(np.asarray(q)[list(children)])) for children in product(range(SYMBOLS), repeat=3)]
    assert abs(tree_law(p, lambda children: [q] * 3, drawn) - p).max() < 1e-12


@pytest.mark.sampled
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_children_without_replacement_are_exact(seed):
    p, q = map(jnp.asarray, some_laws(2, seed=seed))

    def chain(children):
        laws = [q]
        for child in children[:-1]:
            laws.append(without(laws[-1], jnp.int32(child)))
        return laws

    drawn = []
    for children in permutations(range(SYMBOLS), 3):
        probability = np.prod([law[child] for law, child in zip(chain(children), children, strict=True)])
        if probability > 0:
            drawn.append((children, probability))
    # A law with fewer than three possible symbols cannot give three different ones.
    assert (q > 0).sum() < 3 or abs(sum(chance for _, chance in drawn) - 1) < 1e-12
    if (q > 0).sum() >= 3:
        assert abs(tree_law(p, chain, drawn) - p).max() < 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_children_chosen_by_rule_are_exact_with_certain_laws_only(seed):
    p, q = map(jnp.asarray, some_laws(2, seed=seed))
    best = tuple(np.argsort(-q)[:3].tolist())
    sure = lambda children: [certain(jnp.int32(child), p) for child in children]  # noqa: E731
    assert abs(tree_law(p, sure, [(best, 1.0)]) - p).max() < 1e-12


def test_the_drafters_probabilities_of_children_chosen_by_rule_are_not_exact():
    """The control of the tests above: the same enumeration sees the published mistake."""
    off = []
    for seed in range(8):
        p, q = map(jnp.asarray, some_laws(2, seed=seed))
        best = tuple(np.argsort(-q)[:3].tolist())
        off.append(abs(tree_law(p, lambda children, q=q: [q] * 3, [(best, 1.0)]) - p).sum() / 2)
    assert max(off) > 0.1


def test_a_tree_with_one_child_a_node_is_the_chain():
    random = np.random.default_rng(5)
    for seed in range(40):
        p, q = some_laws(3, seed=seed), some_laws(2, seed=500 + seed)
        drafts = np.array([random.choice(SYMBOLS, p=law) for law in q], np.int32)
        uniforms = random.random(2)
        accepted, law = accept_chain(*(jnp.asarray(array)[None] for array in (p, q, drafts, uniforms)))
        depth, rest = 0, jnp.asarray(p[2])
        while depth < 2:
            step = slice(depth, depth + 1)
            child, rest_here = accept_child(
                jnp.asarray(p[depth]), jnp.asarray(q[step]), jnp.asarray(drafts[step]), jnp.asarray(uniforms[step])
            )
            if int(child) == 1:
                rest = rest_here
                break
            depth += 1
        assert int(accepted[0]) == depth
        np.testing.assert_allclose(law[0], rest, rtol=1e-12)


def test_equal_laws_accept_everything_and_disjoint_ones_nothing():
    p = jnp.asarray(some_laws(1, 4, seed=3))
    drafts = jnp.argmax(p[:, :3], axis=-1)
    almost = jnp.full((1, 3), 1 - 1e-16)
    accepted, law = accept_chain(p, p[:, :3], drafts, almost)
    assert int(accepted[0]) == 3 and np.array_equal(law[0], p[0, 3])
    left, right = np.array([0.5, 0.5, 0, 0, 0]), np.array([0, 0, 0.2, 0.3, 0.5])
    accepted, law = accept_chain(
        jnp.asarray([[left, left]]), jnp.asarray([[right]]), jnp.asarray([[4]]), jnp.zeros((1, 1))
    )
    assert int(accepted[0]) == 0 and np.array_equal(law[0], left)


def test_greedy_laws_accept_the_longest_matching_prefix():
    p = jnp.asarray([[one_hot(token) for token in (1, 2, 3, 4)]])
    for drafts, expected, token in (((1, 2, 3), 3, 4), ((1, 2, 0), 2, 3), ((0, 2, 3), 0, 1)):
        q = jnp.asarray([[one_hot(draft) for draft in drafts]])
        accepted, law = accept_chain(p, q, jnp.asarray([drafts]), jnp.full((1, 3), 0.999))
        assert int(accepted[0]) == expected and np.array_equal(law[0], one_hot(token))
