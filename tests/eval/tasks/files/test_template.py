"""Claims about templates: where they are cut, and that content is never taken for a template."""

from kvx.eval.tasks.files.template import filled


def test_the_first_part_ends_with_the_context():
    assert filled("a {x} b {context} c {y}{x}", "CON", {"x": "1", "y": "2"}) == ("a 1 b CON", " c 21")


def test_content_is_not_a_template():
    context, text = filled("{context}|{x}", "{x} {context} {z}", {"x": "{y}", "y": "no"})
    assert context == "{x} {context} {z}" and text == "|{y}"
