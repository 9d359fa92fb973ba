"""Templates come with models from anywhere: none may reach Python, hang or fill the memory."""

from __future__ import annotations

import pytest

from openmimo.errors import TextError
from openmimo.text import ChatTemplate, Tokenizer

USER = [{"role": "user", "content": "Hi"}]
SHOW = "{{ messages[0].content }}"

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].content.__class__ }}",
    "{{ messages[0].content._text }}",
    "{{ messages[0].content._vault.restore }}",
    "{{ ''|attr('__class__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%s' % messages }}",
    "{{ namespace().__class__.__mro__ }}",
    "{{ range.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]
BOMBS = [
    "{{ 'x' * 10**9 }}",
    "{{ [1] * 10**9 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(9) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(9) %}{% set ns.x = ns.x|replace('x', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|string }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}abcdefgh{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(9999) %}{{ messages[0].content * 9999 }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|indent(10**9) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ range(99999)|join('x' * 99999) }}",
]
FAULTS = [
    "{{ 1 / 0 }}",
    "{{ undefined_name.field }}",
    "{{ 'a' < 1 }}",
    "{{ raise_exception('no system turn allowed') }}",
    "{% for %}",
    "{{ 'x'|no_such_filter }}",
    "{{ (" + "(" * 5000 + "1" + ")" * 5000 + ") }}",
    "x" * 1_000_001,
]


@pytest.mark.parametrize("source", ESCAPES + BOMBS + FAULTS, ids=lambda source: source[:50])
def test_hostile_and_faulty_templates_are_an_error(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(TextError):
        ChatTemplate(tokenizer, template=SHOW + source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "{{ messages[0].role }}",
        SHOW + "{{ messages[0].content|upper|lower ~ 'x' }}{{ (messages[0].content ~ 'q')[3:] }}",
    ],
)
def test_a_template_must_not_lose_or_change_messages(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(TextError, match=r"leaves out|changes"):
        ChatTemplate(tokenizer, template=source).render(USER)


def test_the_allowance_starts_anew_for_each_rendering(tokenizer: Tokenizer) -> None:
    """Catches work that is counted over the life of a template."""
    template = ChatTemplate(tokenizer, template="{% for i in range(99999) %}{% endfor %}" + SHOW)
    for _ in range(25):
        assert template.render(USER)


def test_the_prompt_is_limited_in_size(tokenizer: Tokenizer) -> None:
    """The limit holds for messages and for what the template makes of them."""
    long = [{"role": "user", "content": "x" * 600}]
    for template, messages in ((None, long * 2), (SHOW * 2, long)):
        with pytest.raises(TextError, match="at most 1000"):
            ChatTemplate(tokenizer, template=template, max_characters=1000).render(messages)
        assert ChatTemplate(tokenizer, template=template, max_characters=10_000).render(messages)
