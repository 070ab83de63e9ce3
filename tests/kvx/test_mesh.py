"""Claims about meshes: on 4 x 2 devices every policy gives one device's tokens and kept positions, in sharded bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import tokenizers.models
from jax.sharding import Mesh, PartitionSpec

import kvx
from kvx.calibrate import calibrate
from kvx.errors import BadInput
from kvx.generate import _decode_step
from kvx.mesh import RULES, Placement, Rules, place_model
from kvx.models import load
from kvx.policy_text import parse_policy
from tests import tiny
from tests.kvx.contract_cases import LATENT, less_with_maps

NEW = 8
# Budgets and groups small enough that every policy evicts, moves or packs within a prompt of 40 tokens.
SMALL = {
    "adakv": "adakv(budget=16, window=4)",
    "cake": "cake(budget=16, window=4)",
    "cam": "cam(budget=16)",
    "d2o": "d2o(budget=16, skip=(0,))",
    "full": "full()",
    "h2o": "h2o(budget=16)",
    "hashevict": "hashevict(budget=16, recent=4)",
    "kivi": "kivi(bits=2, group=8, residual=8)",
    "knorm": "knorm(budget=16)",
    "mikv": "mikv(high=8)",
    "minicache": "minicache(start=0.0)",
    "pyramidinfer": "pyramidinfer(recent=0.1, least=4, block=2)",
    "pyramidkv": "pyramidkv(budget=16, window=4)",
    "q_filters": "q_filters(budget=16, window=4)",
    "quantspec": "quantspec(group=8)",
    "quest": "quest(budget=16, page=4)",
    "razor_attention": "razor_attention(buffer=8, ratio=3, sinks=2, induction=0.3, block=12)",
    "roco": "roco(budget=16, recent=4)",
    "shadowkv": "shadowkv(budget=4, rank=16, chunk=2, outliers=2, local=1)",
    "snapkv": "snapkv(budget=16, window=4)",
    "streaming_llm": "streaming_llm(budget=16)",
    "tidaldecode": "tidaldecode(budget=16, layers=(0,))",
    "tova": "tova(budget=16)",
}
CHAINS = [
    "snapkv(budget=16, window=4)+kivi(bits=2, group=8, residual=8)",
    "pyramidkv(budget=16, window=4)+kivi(bits=2, group=8, residual=8)",
    "h2o(budget=24)+kivi(bits=2, group=8, residual=8)",
    "snapkv(budget=16, window=4)+quest(budget=8, page=4)",
    "snapkv(budget=16, window=4)+mikv(high=8)",
    "snapkv(budget=16, window=4)+paged(page=4)",
]


def mesh():
    """Four ways by rows, two by heads."""
    return jax.make_mesh((4, 2), ("data", "tensor"))


def model():
    """Two layers, and a vocabulary that two devices can share."""
    return tiny.model(num_hidden_layers=2, vocab_size=98)


def placed():
    return place_model(model(), mesh())


def generated(model, policy):
    tokens, lengths = tiny.prompts(40, 33, 25, 17)
    return kvx.generate(model, tokens, lengths=lengths, policy=policy, max_new_tokens=NEW)


def assert_same(here, there):
    """Tokens, and every layer's kept positions slot by slot."""
    np.testing.assert_array_equal(here.tokens, there.tokens)
    for one, many in zip(here.cache.layers, there.cache.layers, strict=True):
        np.testing.assert_array_equal(one.positions(), many.positions())


def spec(array):
    return array.sharding.spec


# The arrays of the first are trained, the second is for latent attention: each has a test of its own.
NAMES = [name for name in kvx.policies.names() if name not in {"less", *LATENT}]
QUICK = {"full", "h2o", "snapkv", "pyramidkv", "quest"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "text",
    [
        *(SMALL.get(name, f"{name}()") for name in NAMES if name in QUICK),
        *(pytest.param(SMALL.get(name, f"{name}()"), marks=pytest.mark.slow) for name in NAMES if name not in QUICK),
        *(pytest.param(text, marks=pytest.mark.slow) for text in CHAINS),
    ],
)
def test_a_mesh_gives_every_policy_the_tokens_and_positions_of_one_device(text):
    policy = parse_policy(text)
    # Calibrated apart where the policy learns, so that its arrays too come from the mesh.
    texts = [tiny.prompts(48, 48, 48, 48, seed=1)[0]]
    one, many = (generated(each, calibrate(policy, each, texts)) for each in (model(), placed()))
    assert_same(one, many)
    assert len(set(np.asarray(many.tokens).ravel().tolist())) > NEW, "a model that repeats one token proves little"


@pytest.mark.slow
def test_trained_maps_serve_a_mesh_as_they_serve_one_device():
    policy = less_with_maps(16, layers=2)
    assert_same(*(generated(each, policy) for each in (model(), placed())))


def test_every_cache_array_is_split_by_rows_and_by_heads_where_it_has_them():
    cache = generated(placed(), parse_policy(SMALL["h2o"])).cache
    for layer in cache.layers:
        assert spec(layer.keys) == spec(layer.values) == spec(layer.slots) == PartitionSpec("data", "tensor")
        assert spec(layer.stats["mass"]) == PartitionSpec("data", "tensor")
    assert spec(cache.next) == PartitionSpec("data")
    shard = cache.layers[0].keys.addressable_shards[0].data
    assert shard.nbytes * 8 == cache.layers[0].keys.nbytes


def test_the_pool_that_layers_share_is_split_although_it_begins_as_zeros():
    cache = generated(placed(), parse_policy(SMALL["d2o"])).cache
    pool = next(part for part in cache.storage if hasattr(part, "slots"))
    assert spec(pool.keys) == spec(pool.slots) == PartitionSpec("data", "tensor")


def test_values_on_the_host_are_split_there():
    cache = generated(placed(), parse_policy(SMALL["shadowkv"])).cache
    for layer in cache.layers:
        assert spec(layer.values.rows) == spec(layer.keys) == PartitionSpec("data", "tensor")
        assert layer.values.rows.sharding.memory_kind == "pinned_host"
        assert layer.keys.sharding.memory_kind == "device"


@pytest.mark.slow
def test_contexts_and_edits_are_placed_like_everything_else():
    """Labels that share positions, a question, and a span replaced, on a mesh and on one device."""
    prompt = kvx.labelled_prompt([[1, 2], [3], [4, 5, 6], []], [[[7] * 20, [8, 9] * 9]] * 4)
    policy, full = parse_policy("ape"), parse_policy("full")
    question, found = np.full((4, 3), 5, np.int32), []
    for each in (model(), placed()):
        _, cache = kvx.prefill(each, prompt.tokens, policy, prompt.lengths, labels=prompt.labels)
        asked, _ = kvx.prefill(each, question, policy, cache=cache)
        _, cache = kvx.prefill(each, prompt.tokens, full, prompt.lengths)
        edited, cache = kvx.edit(each, cache, full, [(4, 9, [11, 12, 13])], tail=question[:, :2])
        found.append((asked, edited, cache.layers[1].positions()))
    for one, many in zip(*found, strict=True):
        np.testing.assert_allclose(one, many, atol=2e-5)
    assert spec(cache.layers[0].keys) == PartitionSpec("data", "tensor") and spec(cache.next) == PartitionSpec("data")


def test_a_run_of_slots_that_all_heads_share_is_split_by_rows_only():
    cache = generated(placed(), parse_policy(SMALL["adakv"])).cache
    tail, run = cache.layers[0].tiers
    assert spec(run.keys) == PartitionSpec("data")
    assert spec(tail.keys) == PartitionSpec("data", "tensor")


@pytest.mark.slow
def test_stores_of_some_heads_are_split_by_rows_and_their_lists_of_heads_are_not():
    """Also where a part has as many heads as there are rows."""
    cache = generated(placed(), parse_policy("razor_attention(buffer=8, ratio=3, heads=((0, 0),))")).cache
    store = cache.layers[0]
    assert spec(store.stores[0].keys) == PartitionSpec("data")
    assert spec(store.stores[1].tiers[1].key) == spec(store.stores[1].tiers[0].slots) == PartitionSpec("data")
    assert spec(cache.layers[1].stores[0].tiers[0].keys) == PartitionSpec("data", "tensor")
    four = tiny.model(num_hidden_layers=1, vocab_size=98, num_attention_heads=8, num_key_value_heads=8)
    heads = tuple((0, head) for head in range(4))
    policy = kvx.policies.razor_attention(8, 3, heads=heads)
    results = [generated(each, policy) for each in (four, place_model(four, mesh()))]
    assert_same(*results)
    assert all(spec(members) == PartitionSpec() for members in results[1].cache.layers[0].split.members)


def test_weights_are_split_by_the_names_of_their_axes():
    block = placed().blocks[0]
    assert spec(block.attention.qkv.kernel[...]) == PartitionSpec(None, "tensor")
    assert spec(block.attention.out.kernel[...]) == PartitionSpec("tensor")
    assert spec(block.mlp.gate_up.kernel[...]) == PartitionSpec(None, None, "tensor")
    assert spec(block.mlp_norm.weight[...]) == spec(block.attention.frequencies[...]) == PartitionSpec()


@pytest.fixture
def directory(tmp_path):
    """The model as a user has it, with a tokenizer of one word."""
    kvx.save(model(), None, tmp_path / "model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def test_load_puts_a_checkpoint_on_the_mesh_where_a_prompt_then_goes_too(directory):
    loaded, _ = kvx.load(directory, mesh=mesh())
    tokens, lengths = tiny.prompts(40, 33, 25, 17)
    policy = parse_policy(SMALL["snapkv"])
    (here, _), (there, cache) = (kvx.prefill(each, tokens, policy, lengths) for each in (model(), loaded))
    np.testing.assert_allclose(here, there, atol=1e-4)
    assert spec(cache.layers[0].keys) == PartitionSpec("data", "tensor")


def test_weights_that_are_to_be_split_wait_in_the_hosts_memory(directory, monkeypatch):
    """Where nothing else is said new arrays go to the default device, which may not hold a whole model."""
    read, seen = load.model_from_checkpoint, []
    monkeypatch.setattr(load, "model_from_checkpoint", lambda *given: seen.append(jnp.zeros(()).device) or read(*given))
    host, other = jax.local_devices(backend="cpu")[0], jax.devices()[5]
    with jax.default_device(other):
        kvx.load(directory, mesh=mesh())
        kvx.load(directory)
    assert seen == [host, other]


def test_rows_that_the_mesh_does_not_divide_are_held_whole_and_give_the_same_logits():
    tokens, lengths = tiny.prompts(30, 20, 10)
    policy = parse_policy(SMALL["snapkv"])
    (one, _), (many, cache) = (kvx.prefill(each, tokens, policy, lengths) for each in (model(), placed()))
    np.testing.assert_allclose(one, many, atol=1e-4)
    assert spec(cache.layers[0].keys) == PartitionSpec(None, "tensor")


@pytest.mark.slow
def test_a_chunked_prompt_and_a_second_turn_stay_on_the_mesh():
    tokens, lengths = tiny.prompts(40, 33, 25, 17)
    policy, caches = parse_policy(SMALL["h2o"]), []
    for each in (model(), placed()):
        _, cache = kvx.prefill(each, tokens, policy, lengths, prefill_chunk=64)
        _, cache = kvx.prefill(each, tokens[:, :3], policy, cache=cache)
        caches.append(cache)
    for one, many in zip(caches[0].layers, caches[1].layers, strict=True):
        np.testing.assert_array_equal(one.positions(), many.positions())
        assert spec(many.keys) == PartitionSpec("data", "tensor")


def test_one_program_serves_every_decode_step_on_a_mesh():
    placed_model, policy = placed(), parse_policy("full()")
    tokens, lengths = tiny.prompts(40, 33, 25, 17)
    _, cache = kvx.prefill(placed_model, tokens, policy, lengths)
    before = _decode_step._cache_size()
    for _ in range(3):
        _, cache = kvx.decode_step(placed_model, jnp.zeros(4, jnp.int32), cache, policy)
    assert _decode_step._cache_size() == before + 1


def test_an_axis_that_no_mesh_axis_divides_is_held_whole():
    placement = Placement(mesh(), RULES)
    assert placement.sharding((4, 3, 8), ("rows", "kv_heads", None)).spec == PartitionSpec("data")
    assert placement.sharding((6, 2, 8), ("rows", "kv_heads", None)).spec == PartitionSpec(None, "tensor")


def test_a_mesh_without_a_rules_axis_holds_that_axis_whole():
    only_rows = Mesh(np.array(jax.devices()), ("data",))
    assert Placement(only_rows, RULES).sharding((8, 2), ("rows", "kv_heads")).spec == PartitionSpec("data")


def test_a_mesh_axis_is_given_to_the_first_of_two_axes_that_want_it():
    rules = Rules(embed="tensor")
    assert Placement(mesh(), rules).sharding((8, 4), ("embed", "mlp")).spec == PartitionSpec("tensor")


def test_other_mesh_axes_are_named_by_other_rules():
    other = jax.make_mesh((2, 2), ("batch", "model"), devices=jax.devices()[:4])
    rules = Rules("batch", "model", "model", "model", "model")
    tokens, _ = tiny.prompts(12, 12)
    _, cache = kvx.prefill(place_model(model(), other, rules), tokens, parse_policy("full()"))
    assert spec(cache.layers[0].keys) == PartitionSpec("batch", "model")


def test_a_mesh_that_no_rule_knows_is_refused():
    with pytest.raises(BadInput, match=r"mesh has axes \['x'\], none of which a rule names; allowed: .*data.*tensor"):
        place_model(model(), Mesh(np.array(jax.devices()), ("x",)))
