"""Claims about the head report: it goes to a file and back into a policy, and its picture shows every head."""

import io
import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import kvx
from kvx.eval.heads.picture import head_map_png, rectangle
from kvx.eval.heads.report import HeadReport, head_report, read_heads, table
from kvx.parts.retrieval_heads import RetrievalHeads
from tests import tiny

SEARCH = RetrievalHeads(0.3, 0.2, block=20)


@pytest.fixture(scope="module")
def reports() -> dict[str, HeadReport]:
    model, (texts, _) = tiny.model(num_hidden_layers=3), tiny.prompts(60, 60)
    return {
        by: head_report("tiny", model, texts, search=SEARCH, by=by, share=0.3, sinks=2, recent=8)
        for by in ("repeats", "text")
    }


def test_a_report_names_the_policy_that_keeps_its_heads(reports, tmp_path):
    for report in reports.values():
        path = tmp_path / "heads.json"
        path.write_text(json.dumps(report.as_json(), allow_nan=False))
        heads = read_heads(path)
        assert heads == report.heads and len(heads) >= 2
        written = json.loads(path.read_text())["policy"]
        assert kvx.parse_policy(written) == kvx.policies.razor_attention(heads=heads)
        assert written == report.policy


def test_heads_chosen_by_text_are_those_that_reach_furthest(reports):
    report = reports["text"]
    reach = np.asarray(report.reach)
    chosen = sorted((reach[layer, head] for layer, head in report.heads), reverse=True)
    assert chosen == sorted(reach.ravel(), reverse=True)[:2], "30 % of six heads, rounded up"


def test_a_kv_head_reaches_as_far_as_the_furthest_of_its_query_heads(reports):
    report = reports["repeats"]
    beyond = 1 - np.asarray(report.local)
    np.testing.assert_allclose(np.asarray(report.reach), beyond.reshape(3, 2, 2).max(axis=2))
    assert (np.asarray(report.first) <= np.asarray(report.local)).all()


def test_both_choices_rest_on_the_same_measurements(reports):
    assert reports["text"].induction == reports["repeats"].induction
    report = reports["repeats"]
    scores = [jnp.asarray(rows) for rows in zip(report.induction, report.echo, strict=True)]
    assert report.heads == SEARCH.choose(scores)


def test_the_table_has_a_row_for_each_layer_and_the_picture_is_one(reports):
    report = reports["repeats"]
    assert table(report).row_count == 3
    picture = matplotlib.image.imread(io.BytesIO(head_map_png(report)), format="png")
    red = (abs(picture[..., :3] - np.asarray([0xD1, 0x49, 0x5B]) / 255) < 0.02).all(axis=-1)
    assert red.sum() > 50 * len(report.heads), "the chosen heads are framed"


def test_the_report_says_what_the_first_token_is(reports):
    sinks = reports["text"].sinks
    assert 0 <= sinks["rate"] <= 100 and sinks["tokens"] == 60
    assert [len(sinks[name]) for name in ("hidden", "keys", "values", "drains", "peaks", "gaps")] == [4, 3, 3, 3, 3, 3]


def test_layers_of_unlike_heads_make_one_rectangle():
    np.testing.assert_array_equal(rectangle(((1.0, 2.0), (3.0,))), [[1, 2], [3, np.nan]])


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", 'has no "heads"'),
        ('{"heads": [[0, -1]]}', 'has no "heads"'),
        ('{"heads": [[0, true]]}', 'has no "heads"'),
        ('{"heads": [[0, 1, 2]]}', 'has no "heads"'),
        ('{"heads": 3}', 'has no "heads"'),
    ],
)
def test_a_file_that_names_no_heads_is_refused(content, message, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(content)
    with pytest.raises(kvx.BadInput, match=message):
        read_heads(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(kvx.BadInput, match="cannot be read: No such file"):
        read_heads(tmp_path / "none.json")


def test_another_rule_is_refused():
    with pytest.raises(kvx.BadInput, match="by='depth' is not offered; allowed: 'repeats', 'text'"):
        head_report("tiny", tiny.model(num_hidden_layers=2), tiny.prompts(60)[0], search=SEARCH, by="depth")
