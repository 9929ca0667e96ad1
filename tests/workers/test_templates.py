"""Chat templates are code from strangers: what they may do, and what they may not."""

from __future__ import annotations

import resource

import pytest

from lmweb.errors import TemplateError
from workers.schemas import ChatMessage
from workers.templates import ChatTemplate

TALK = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hi {{ 7*7 }}")]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(TALK, variables=variables)


def test_an_ordinary_template_renders_and_data_stays_data() -> None:
    assert (
        render("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content }}\n{% endfor %}")
        == "<s>[system] Be brief.\n[user] Hi {{ 7*7 }}\n"
    )


def test_no_template_means_chatml() -> None:
    assert render("").endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_helpers_that_templates_expect() -> None:
    assert render("{{ messages[0] | tojson }}") == '{"role": "system", "content": "Be brief."}'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}") == "system"
    assert render("{% generation %}{{ messages[0].role }}{% endgeneration %}!") == "system!"
    assert render("{{ 'a\n\nb' | indent(2) }}|{{ 'a\nb' | indent('> ', first=true) }}") == "a\n\n  b|> a\n> b"
    assert render("{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}") == '{"a":1,"b":"\\u00e9"}'
    assert render("{{ '<think{}>{}'.format(':x', 1) }}") == "<think:x>1"
    assert render("{% set x = namespace(a=[]) %}{% set _ = x.a.append(1) %}{{ x.a }}") == "[1]"
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__ }}",
        "{% set x = messages.clear() %}",
        "{% set x = messages[0].update(a=1) %}",
        "{% set x = [1] %}{% for i in range(99999) %}{% for j in range(99999) %}{% set _ = x.append(x) %}{% endfor %}{% endfor %}",
        "{{ '{0}{0}'.format(1) }}",
        "{{ '{a}'.format_map(messages[0]) }}",
        "{{ ('a' * 100000) | indent(999) | indent('b' * 999999) }}{{ ('\\n' * 99999) | indent(999) }}",
        "{% generation %}unclosed",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' * 999999999 }}",
        "{{ [1] * 999999999 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a'|center(999999999) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['a'] * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{{ 'a' * 100000 | replace('a', 'b' * 100000) }}",
        "{{ messages[99].content.nothing }}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ unclosed",
    ],
)
def test_attacks_and_mistakes_end_in_words(attack: str) -> None:
    with pytest.raises(TemplateError):
        render(attack)


def test_growing_strings_stay_small() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for join in ("ns.x ~ ns.x", "ns.x + ns.x", "(ns.x, ns.x) | join", "''.join([ns.x, ns.x])"):
        with pytest.raises(TemplateError, match="too long a text"):
            render("{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = " + join + " %}{% endfor %}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_template_may_be_only_so_long() -> None:
    with pytest.raises(TemplateError, match="too long"):
        render("x" * 600_000)
