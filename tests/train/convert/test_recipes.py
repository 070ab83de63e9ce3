"""Claims about recipes by name: what they put together, how they are asked for as text, and every refusal."""

import pytest

from kvx.errors import BadInput
from kvx.train.convert.concentrated import Unsteady
from kvx.train.convert.recipes import by_effect, mha2mla, names, parse_recipe, recipe, transmla, x_ecomla
from kvx.train.convert.weighing import ByEffect
from tests.train.convert import layers


@pytest.mark.parametrize(
    ("text", "split", "weighing"),
    [
        ("by_effect(rank=8, rotary=8)", Unsteady(8), ByEffect()),
        ("by_effect(rank=8, rotary=8, attended=False)", Unsteady(8, attended=False), ByEffect(attended=False)),
        ("by_effect(rank=8, rotary=8, mean_phase=False)", Unsteady(8, mean_phase=False), ByEffect()),
        ("by_effect(rank=8, rotary=8, fold=4)", transmla(8, 8).split, ByEffect()),
    ],
)
def test_what_our_start_owes_to_which_part_can_be_asked_for(text, split, weighing):
    found = parse_recipe(text)
    assert (found.split, found.weighing, found.text) == (split, weighing, text)


def test_recipes_are_known_by_name():
    assert names() == ("by_effect", "gqa", "mha2mla", "transmla", "x_ecomla")
    assert recipe("transmla", rank=64, rotary=32).text == "transmla(rank=64, rotary=32)"


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: recipe("trans_mla", rank=1), "did you mean 'transmla'"),
        (lambda: recipe("transmla", rank=1, rotarry=3), "did you mean 'rotary'"),
        (lambda: recipe("transmla"), "missing a required argument"),
        (lambda: x_ecomla(8, query_energy=0.9), "without query_rank"),
        (lambda: x_ecomla(8, query_rank=0), "query_rank=0"),
        (lambda: x_ecomla(8, energy=1.5), "^energy=1.5 is out of range; allowed: above 0, up to 1"),
        (lambda: x_ecomla(8, query_rank=8, query_energy=2.0), "^query_energy=2.0 is out of range"),
        (lambda: x_ecomla(8, factorisation="both"), "unknown factorisation 'both'"),
        (lambda: x_ecomla(8, singular="left"), "unknown side"),
        (lambda: transmla(8, 8, alpha=0.0), "alpha=0.0 is out of range; allowed: a finite number above 0"),
        (lambda: by_effect(8, 8, mean_phase=False, fold=4), "mean_phase=False with fold=4; allowed: one of the two"),
        (lambda: by_effect(12, 6, spread=True), "rank=12 is out of range; allowed: multiples of 8 from 8 on"),
        (lambda: x_ecomla(65, rotary=6)(layers.model()), "rank=65 is out of range; allowed: 1 to 64"),
        (lambda: x_ecomla("64"), "rank='64' of x_ecomla; allowed: an integer"),
        (lambda: x_ecomla(64, energy="a"), "energy='a' of x_ecomla; allowed: a finite number"),
        (lambda: transmla(64, 16.0), r"rotary=16.0 of transmla; allowed: an integer"),
        (lambda: recipe("gqa", kv_heads=True), "kv_heads=True of gqa; allowed: an integer"),
        (
            lambda: x_ecomla(8, 6, query_rank=1000).shapes(layers.model()),
            "query_rank=1000 is out of range; allowed: 1 to",
        ),
        (lambda: x_ecomla(8, 6, 8, energy=0.9).shapes(layers.model()), "known once its weights are"),
        (lambda: transmla(8, 8, fold=3).shapes(layers.model()), "fold=3 is out of range"),
        (lambda: recipe("gqa", kv_heads=3).shapes(layers.model()), "kv_heads=3 is out of range"),
        (lambda: x_ecomla(8, rotary=6, layers=(2,))(layers.model()), "allowed: 0 to 1"),
        (lambda: x_ecomla(8, rotary=6, layers=())(layers.model()), "at least one index"),
        (lambda: transmla(8, 8)(layers.model()), "needs them"),
        (lambda: transmla(8, 8)(layers.model(), layers.moments()[:1]), "moments has 1 layers"),
        (lambda: mha2mla(8, 6)(layers.model(), layers.moments()), "multiples of 4"),
    ],
)
def test_bad_input_is_refused(build, sentence):
    with pytest.raises(BadInput, match=sentence):
        build()
