"""Claims about the page: it holds everything and loads nothing, text stays text, and equal studies give equal bytes."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html import unescape
from importlib.resources import files
from itertools import groupby

import pytest

from kvx.errors import BadInput
from kvx.eval.records import Cell
from kvx.eval.report import Study, report, write_report
from kvx.eval.report.document import SCRIPTS, STYLES
from tests.eval.report import example

SVG = "http://www.w3.org/2000/svg"
ALL = ["findings", "frontier", "depths", "budgets", "kept", "costs", "table"]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\u2028'\""


@pytest.fixture(scope="module")
def study():
    return example.study(samples=2, tokens=24, layers=2)


@pytest.fixture(scope="module")
def page(study):
    return report(study)


def island(page: str) -> dict:
    """The page's data."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', page)


def test_the_page_holds_every_policy_and_every_cell(study, page):
    data = island(page)
    assert {each["text"] for each in data["policies"]} == {record.policy for record in study.records}
    assert {Cell(**each) for each in data["cells"]} == {record.cell for record in study.records}
    shown = {(row["cell"], row["policy"]) for row in data["rows"]}
    assert len(shown) == len(data["rows"]) == len({(record.cell, record.policy) for record in study.records})
    assert len(data["kept"]["maps"]) == len(study.kept) and len(data["costs"]) == len(study.costs)


def test_rows_say_what_the_summary_says(study, page):
    data = island(page)
    for row, shown in zip(study.rows, data["rows"], strict=True):
        assert data["policies"][shown["policy"]]["text"] == row.policy
        assert shown["score"][0] == pytest.approx(row.score.mean, rel=1e-5) and shown["score"][3] == row.score.count
        assert (shown["stored"], shown["read"], shown["lower"]) == (
            row.cache_bytes,
            row.bytes_read,
            row.lower_is_better,
        )
        assert (shown["difference"] is None) == (row.policy == "full")


def test_the_full_cache_comes_first_and_families_stand_together(page):
    policies = island(page)["policies"]
    assert policies[0]["text"] == "full" and [each["full"] for each in policies] == [True] + [False] * len(policies[1:])
    runs = [name for name, _ in groupby(each["family"] for each in policies)]
    assert len(runs) == len(set(runs))


def test_the_page_loads_nothing(page):
    without_data = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert set(re.findall(r"""(?:[a-z]+:)?//[^\s"'`)]*\.[a-z]+[^\s"'`)]*""", without_data)) == {SVG}
    assert not re.search(r"@import|url\(|<link|<img|<iframe|\ssrc=|fetch\(|XMLHttpRequest|\simport[ (]", without_data)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", without_data)


def test_the_security_policy_allows_this_style_and_this_script_and_nothing_else(page):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    style, script = (
        re.findall(r"<style>(.*?)</style>", page, re.DOTALL),
        re.findall(r"<script>(.*?)</script>", page, re.DOTALL),
    )
    assert len(style) == len(script) == 1
    source = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("style-src", style[0]), ("script-src", script[0]))
    }
    assert dict(each.strip().split(" ", 1) for each in policy.split(";")) == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        **{name: f"'sha256-{digest}'" for name, digest in source.items()},
    }
    assert " style=" not in page and not re.search(r"<[^>]+\son[a-z]+=", page)


def test_every_file_beside_the_code_is_part_of_the_page(page):
    folder = files("kvx.eval.report") / "page"
    parts = {*(f"{name}.js" for name in SCRIPTS), *(f"{name}.css" for name in STYLES)}
    assert {each.name for each in folder.iterdir()} == parts | {"page.html"}
    assert all((folder / name).read_text("utf-8") in page for name in parts)


def test_hostile_text_stays_text():
    cell = Cell(HOSTILE, HOSTILE, 64, "agnostic")
    first = example.study(samples=1, tokens=4, layers=1)
    records = [replace(each, cell=cell, policy=HOSTILE, answers=(HOSTILE,)) for each in first.records[:1]]
    kept = [replace(first.kept[0], cell=cell, policy=HOSTILE, text=(HOSTILE,) * 4)]
    costs = [replace(first.costs[0], model=HOSTILE, policy=HOSTILE)]
    page = report(Study({"name": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}, records, kept, costs))
    data = island(page)
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<img" not in page
    assert data["policies"][0]["text"] == HOSTILE and data["cells"][0]["task"] == HOSTILE
    assert data["kept"]["prompts"][0]["tokens"] == [HOSTILE] * 4 and data["costs"][0]["model"] == HOSTILE
    (title,) = re.findall("<title>(.*?)</title>", page, re.DOTALL)
    assert unescape(title) == HOSTILE


def test_dollars_in_results_are_no_placeholders():
    assert "<title>$data ${script} $$</title>" in report(Study({"name": "$data ${script} $$"}, []))


def test_equal_studies_give_equal_pages(study, page, tmp_path):
    assert report(example.study(samples=2, tokens=24, layers=2)) == page
    folder = example.write(tmp_path / "results", study)
    assert write_report(folder).read_text(encoding="utf-8") == page
    assert write_report(folder).read_text(encoding="utf-8") == page


def test_all_sections_stand_in_the_page_and_in_its_contents(page):
    assert sections(page) == ALL
    assert re.findall(r'<li><a href="#([^"]+)"', page) == ALL[1:]


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"costs": ()}, {"costs"}),
        ({"kept": ()}, {"budgets", "kept"}),
        ({"records": ()}, {"findings", "frontier", "depths", "table"}),
        ({"records": (), "kept": (), "costs": ()}, set(ALL)),
    ],
)  # fmt: skip
def test_a_part_without_results_leaves_no_section(study, page, change, gone):
    less = report(replace(study, **change))
    assert sections(less) == [name for name in sections(page) if name not in gone]
    assert not gone & set(re.findall(r'<li><a href="#([^"]+)"', less))


def test_records_without_a_depth_leave_no_heat_maps(study, page):
    less = report(replace(study, records=[replace(record, depth=None) for record in study.records]))
    assert sections(less) == [name for name in sections(page) if name != "depths"]


def test_the_configuration_is_shown_whole(study, page):
    assert '<th scope="row">device.platform</th><td>cpu</td>' in page
    assert '<th scope="row">lengths</th><td>2048, 4096</td>' in page
    assert '<th scope="row">tasks 2.name</th><td>key_value(digits=32)</td>' in page


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("{", "is no JSON"), ("[1]", "holds a list"), ('"' + "x" * 4_000_001 + '"', "at most")],
)
def test_a_folder_without_a_readable_configuration_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=said):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_broken_record_is_named_by_its_line_and_nothing_is_overwritten(study, tmp_path):
    folder = example.write(tmp_path, replace(study, records=study.records[:2]))
    written = write_report(folder).read_bytes()
    lines = (folder / "records.jsonl").read_text().splitlines()
    (folder / "records.jsonl").write_text("\n".join([lines[0], "{}", ""]))
    with pytest.raises(BadInput, match="line 2"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == written
