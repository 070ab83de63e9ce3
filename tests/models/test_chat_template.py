"""A chat template renders as Hugging Face's does; a hostile one is refused within its limits."""

import subprocess
import sys
import time

import pytest

from kvx.errors import BadInput
from kvx.models import chat_template
from kvx.models.chat_template import ChatRenderer, render_chat

MESSAGES = [{"role": "user", "content": "<hi> & 'bye'"}]


def rendered(template: str, **variables) -> str:
    return render_chat(template, {"messages": MESSAGES, **variables})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}\n{{ m.role }}: {{ m['content'] }}\n{% endfor %}\n", "user: <hi> & 'bye'\n"),
        ("{%- if add_generation_prompt -%}\n  A\n{%- endif %}", "A"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<hi> & \'bye\'"}]'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(indent=1) }}", '{\n "b": 1,\n "a": "é"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ undefined_name }}|{{ tools is none }}", "|True"),
        ("{{ '☃' }}", "☃"),
    ],
)
def test_renders_what_templates_use(template, expected):
    assert rendered(template, add_generation_prompt=True, tools=None) == expected


def test_the_date_can_be_asked_for():
    assert rendered("{{ strftime_now('%Y') }}").isdecimal()


def test_a_template_may_refuse_the_messages():
    with pytest.raises(BadInput, match="only even turns"):
        rendered("{{ raise_exception('only even\n turns') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ range(10 ** 9) | list }}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{" + "(" * 9000 + "1" + ")" * 9000 + "}}",
        "{% if",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_hostile_template_is_refused_within_its_limits(template):
    started = time.perf_counter()
    with pytest.raises(BadInput, match="chat template") as refusal:
        render_chat(template, {"messages": MESSAGES}, seconds=0.5, memory=256 << 20)
    assert time.perf_counter() - started < 8  # half a second, and the start of an interpreter on a busy machine
    assert "\n" not in str(refusal.value)


def test_a_renderer_of_many_serves_them_with_one_child_and_starts_another_after_a_hostile_one():
    render = ChatRenderer(seconds=0.5, memory=256 << 20)
    variables = {"messages": MESSAGES}
    assert [render("{{ messages | length }}" + "\n" + str(index), variables) for index in range(20)] == [
        f"1\n{index}" for index in range(20)
    ]
    first = render._child
    with pytest.raises(BadInput, match="cannot be rendered"):
        render("{% if", variables)
    assert render._child is first
    with pytest.raises(BadInput, match="exceeds its limits"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", variables)
    assert render("again", variables) == "again" and render._child is not first
    time.sleep(0.6)  # longer than one rendering may take: the clock does not run between requests
    assert render("{{ messages[0].role }}", variables) == "user"
    last = render._child
    del render
    assert last.returncode is not None


def test_a_template_that_is_too_long_is_refused():
    with pytest.raises(BadInput, match="characters, allowed are"):
        rendered("a" * (chat_template.MAX_TEMPLATE_CHARACTERS + 1))


def test_messages_that_json_does_not_have_are_refused():
    with pytest.raises(BadInput, match="allowed are JSON's types"):
        rendered("x", extra=object())


def test_the_child_does_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("KVX_TEST_SECRET", "1")
    seen = {}

    def run(command, **options):
        seen.update(options["env"])
        return subprocess.CompletedProcess(command, 0, b'{"text": ""}')

    monkeypatch.setattr(chat_template.subprocess, "run", run)
    rendered("x")
    assert "KVX_TEST_SECRET" not in seen


def test_the_child_imports_neither_jax_nor_kvx():
    code = (
        f"import runpy, sys; runpy.run_path({str(chat_template._CHILD)!r}, run_name='child'); "
        "print(sorted({'jax', 'numpy', 'kvx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
