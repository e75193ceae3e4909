#!/usr/bin/env python3
"""template_vectors.py TEMPLATE_DIR [MODEL.gguf ...] OUT_DIR [--all] - chat templates, conversations and what jinja2 makes of them.

TEMPLATE_DIR holds *.jinja (llama.cpp's models/templates); of these the ones named below are kept, or all with --all. jinja2 is set up
as Hugging Face's apply_chat_template does it. language.json holds small pieces of the language itself. Needs: jinja2, gguf.
"""
import datetime, glob, json, os, sys
import jinja2, jinja2.ext, jinja2.sandbox

NOW = 1763856000
KEEP = ["CohereForAI-c4ai-command-r7b-12-2024-tool_use", "GLM-4.6", "HuggingFaceTB-SmolLM3-3B", "MiMo-VL", "Mistral-Small-3.2-24B-Instruct-2506",
        "Qwen-QwQ-32B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3-Coder", "Qwen3.5-4B",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-V3.1", "google-gemma-2-2b-it",
        "ibm-granite-granite-3.3-2B-Instruct", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "microsoft-Phi-3.5-mini-instruct",
        "mistralai-Mistral-Nemo-Instruct-2407", "moonshotai-Kimi-K2", "openai-gpt-oss-120b", "NVIDIA-Nemotron-Nano-v2", "ByteDance-Seed-OSS",
        "LFM2.5-8B-A1B", "MiniMax-M2", "Reka-Edge", "deepseek-ai-DeepSeek-V3.2", "llama-cpp-deepseek-r1", "GLM-4.7-Flash",
        "Kimi-K2-Instruct", "Kimi-K2-Thinking", "GigaChat3-10B-A1.8B"]

m = lambda *rows: [{"role": r, "content": c} for r, c in rows]
CONVERSATIONS = [
    m(("user", "Hello")),
    m(("system", "You are terse."), ("user", "Hi there!")),
    m(("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?")),
    m(("system", "  Be kind. \n"), ("user", "\n What's \"this\" <b>?\n"), ("assistant", "<think>\nhm\n</think>\n\nA café – 日本語 👍"), ("user", "ok\\n{{ x }}{% y %}"),
      ("assistant", " done ")),
    m(("assistant", "I begin"), ("user", "no")),
    m(("user", "a"), ("user", "b")),
]

LANGUAGE = r"""
plain text
{{ 'a' }}{{ "b" 'c' }}|{{ 1 }}|{{ 1.5 }}|{{ 1e3 }}|{{ true }}|{{ None }}|{{ nothing }}
{{ 1 + 2 * 3 - 4 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 10 / 5 }} {{ -2 ** 2 }}
{{ 'a' + 'b' }} {{ 'a' ~ 1 ~ none ~ true }} {{ 'ab' * 3 }} {{ [1] + [2] }} {{ (1, 2) }} {{ (1,) }} {{ [1, 'x', none, 1.0] }} {{ {'a': 1, "b": [2]} }}
{{ 1 < 2 }} {{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ 'a' < 'b' }} {{ 1 == 1.0 }} {{ 'a' == 'a' }} {{ 1 != 2 }} {{ none == none }} {{ [1,2] == [1,2] }} {{ true == 1 }}
{{ 'b' in 'abc' }} {{ 'x' not in 'abc' }} {{ 2 in [1,2] }} {{ 'k' in {'k': 1} }} {{ '' in '' }}
{{ not true }} {{ true and 'x' }} {{ '' or 'y' }} {{ not nothing }} {{ 'a' if false else 'b' }} {{ 'a' if false }}
{% if 0 %}a{% elif '' %}b{% elif [] %}c{% else %}d{% endif %}
{% for x in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }} {% endfor %}
{% for x in [] %}a{% else %}none{% endfor %}
{% for x in [1,2,3,4] if x is even %}{{ x }}{{ loop.last }}{% endfor %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}
{% for x in range(10) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in 'héy' %}[{{ x }}]{% endfor %}
{% for x in [1,2,3] %}{{ loop.previtem }}-{{ loop.nextitem }} {% endfor %}
{% set x = 1 %}{% for i in [1,2] %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}
{% set ns = namespace(n=0, s='') %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% set ns.s = ns.s ~ i %}{% endfor %}{{ ns.n }} {{ ns.s }}
{% set a, b = 1, 2 %}{{ b }}{{ a }}
{% set t %}  caught {{ 1 + 1 }} {% endset %}[{{ t }}]
{% set t | trim | upper %}  caught {% endset %}[{{ t }}]
{% macro f(a, b='x', c=none) %}<{{ a }}{{ b }}{{ c }}>{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(1, c=3) }}{{ f() }}
{% macro r(n) %}{{ n }}{% if n > 0 %}{{ r(n - 1) }}{% endif %}{% endmacro %}{{ r(3) }}
{% set y = 'late' %}{% macro g() %}{{ y }}{% endmacro %}{{ g()|upper }}
{% filter upper %}shout {{ 'it' }}{% endfilter %}
{% generation %}said{% endgeneration %}
a {%- if true %} b {%- endif %} c
a {% if true -%} b {% endif -%} c
{#- comment -#} x {# y #} z
  {% if true %}  ¶
  indented
  {% endif %}  ¶
  end
    {%+ if true %}kept{% endif %}
{% if true +%}
kept newline{% endif %}
  {{ 'not stripped' }}  ¶
line{# c #}
next
a {{- ' b ' -}} c
{{ '{{' }} {{ "%}" }} {{ {'a': {'b': 1}} }} {{ {'a': {}}['a'] }}
{{ 'tab\tnl\nq\'q"u\u00e9\x41\\ \d' }}
{{ 'abc'[0] }}{{ 'abc'[-1] }}{{ 'abc'[1:] }}{{ 'abc'[:-1] }}{{ 'abc'[::-1] }}{{ 'häß'[1:2] }}{{ [1,2,3,4][1:3] }}{{ [1,2,3,4][::2] }}{{ [1,2,3][::-1] }}{{ [1,2][5:] }}{{ 'abc'[5] }}
{{ [1,2,3][-1] }} {{ {'a': 1}.a }} {{ {'a': 1}['a'] }} {{ {'a': 1}.b is defined }} {{ {'a': 1}['b'] }} {{ [1][4] is undefined }}
{{ ' x '|trim }}|{{ 'xxaxx'|trim('x') }}|{{ 'a b'|upper }}|{{ 'A B'|lower }}|{{ 'hello wORLD'|capitalize }}|{{ 'hello wORLD foo-bar'|title }}
{{ [1,2,3]|length }}{{ 'häß'|length }}{{ {'a': 1}|count }}{{ nothing|length }}
{{ nothing|default('d') }}{{ ''|default('d') }}{{ ''|default('d', true) }}{{ none|d('x') }}{{ false|default('x', boolean=true) }}
{{ [1,2]|join(', ') }}{{ ['a','b']|join }}{{ [{'n': 1}, {'n': 2}]|join('-', attribute='n') }}
{{ [3,1,2]|sort }}{{ ['b','A','c']|sort }}{{ ['b','A','c']|sort(case_sensitive=true) }}{{ [1,2]|sort(reverse=true) }}{{ [{'k': 2}, {'k': 1}]|sort(attribute='k') }}
{{ {'b': 1, 'a': 2}|dictsort }}{{ {'b': 1, 'a': 2}|items|list }}{{ {'b': 1, 'a': 2}|list }}{{ {'x': 2, 'y': 1}|dictsort(by='value') }}
{{ [1,2,3]|first }}{{ [1,2,3]|last }}{{ 'abc'|first }}{{ [1,2,3]|reverse|list }}{{ 'abc'|reverse }}{{ [1,1,2]|unique|list }}{{ 'abc'|list }}
{{ '42'|int }}{{ 'x'|int }}{{ 'x'|int(7) }}{{ 3.9|int }}{{ '1.5'|float }}{{ 3|float }}{{ 1|string }}{{ (-3)|abs }}{{ none|string }}
{{ 'aXbX'|replace('X', 'y') }}{{ 'aXbX'|replace('X', 'y', 1) }}{{ 'x'|safe }}
{{ 'a\nb\n\nc'|indent }}|{{ 'a\nb'|indent(2, true) }}|{{ 'a\n\nb'|indent(1, blank=true) }}|{{ 'a\nb\n'|indent('> ') }}
{{ [1, 'a"\n\té', none, true, 1.5, {'k': []}]|tojson }} {{ {}|tojson }} {{ [[]]|tojson(indent=2) }}
{{ {'b': [1, {'c': 2}], 'a': {}}|tojson(indent=4) }}
{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }} {{ '<&>\u2028\x7f\x01'|tojson }}
{{ [{'r': 'u', 'c': 1}, {'r': 'a', 'c': 2}]|selectattr('r', 'equalto', 'u')|map(attribute='c')|list }} {{ [1,2,3,4]|select('odd')|list }} {{ [1,2,3]|reject('gt', 1)|list }}
{{ [{'a': 1}, {'b': 2}]|selectattr('a', 'defined')|list }} {{ [{'a': 0}, {'a': 2}]|selectattr('a')|list }} {{ [{'a': 0}, {'a': 2}]|rejectattr('a')|list }}
{{ ['a','b']|map('upper')|join }} {{ ['a1','b1']|map('replace', '1', '2')|join(',') }} {{ [{'a': {'b': 3}}]|map(attribute='a.b')|list }} {{ [{}]|map(attribute='z', default='q')|list }}
{{ 1 is number }} {{ 'a' is string }} {{ {} is mapping }} {{ [] is sequence }} {{ 'a' is iterable }} {{ 1 is iterable }} {{ none is none }} {{ true is boolean }} {{ 1 is boolean }} {{ 1 is integer }} {{ 1.0 is float }} {{ true is true }} {{ 0 is false }}
{{ 4 is divisibleby 2 }} {{ 4 is divisibleby(3) }} {{ 3 is odd }} {{ 1 is eq 1 }} {{ 1 is ne 1 }} {{ 1 is lt 2 }} {{ 2 is in [1,2] }} {{ 'a' is sameas 'a' }} {{ 'a' is lower }} {{ 'a' is upper }} {{ namespace is callable }}
{{ x is not defined and y is undefined }} {{ not x is defined }} {{ 1 + 1 is odd }} {{ -1|abs }} {{ 'a' ~ 'b'|upper }}
{{ ' a b '.strip() }}|{{ 'xxa'.lstrip('x') }}|{{ 'a\n'.rstrip() }}|{{ 'a,b,c'.split(',') }}|{{ ' a  b '.split() }}|{{ 'a,b,c'.split(',', 1) }}|{{ 'a,b,c'.rsplit(',', 1) }}|{{ 'a b c'.split(none, 1) }}|{{ 'x'.split(',')[-1] }}
{{ 'abc'.startswith('a') }}{{ 'abc'.endswith('bc') }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'abc'.find('c') }}{{ 'abc'.find('z') }}{{ 'abcabc'.rfind('b') }}{{ 'aXa'.replace('X', '-') }}{{ 'aba'.count('a') }}{{ 'Ab'.upper() }}{{ 'Ab'.lower() }}{{ 'ab cd'.title() }}{{ ', '.join(['a', 'b']) }}
{{ 'a\nb\r\nc\n'.splitlines() }}{{ '{} and {}'.format(1, 'x') }}{{ '{0}{0}{n}'.format('a', n=2) }}{{ '{{}}'.format() }}{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ '12'.isdigit() }}{{ 'a2'.isdigit() }}
{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.keys()|list }}{{ {'a': 1}.values()|list }}{{ {'a': 1}.items()|list }}
{{ range(3)|list }}{{ range(1, 4)|list }}{{ range(5, 0, -2)|list }}{{ dict(a=1, b=2) }}
{{ strftime_now('%Y-%m-%d') }} {{ strftime_now("%d %b %Y") }} {{ strftime_now('%A %H:%M:%S') }}
{{ messages[0]['role'] }} {{ messages[0].content }} {{ messages|length }} {{ messages[-1].role }} {{ bos_token }}{{ eos_token }} {{ tools is none }} {{ tools is defined }} {{ messages[0].tool_calls is defined }} {{ messages[0].get('x', 'y') }}
{{ messages[1:]|length }}{{ messages|map(attribute='role')|join(',') }} {{ messages[0] }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ "it's" }} {{ ["it's", 'a"b', 'a\\n'] }} {{ 1.0 }} {{ 0.1 + 0.2 }} {{ 1e20 }} {{ 1.5e-7 }} {{ 100.0 }} {{ 123456.789 }} {{ 5e15 }} {{ 0.0001 }}
{{ [1, [2, (3,)], {'k': none}] }} {{ [true, false] }}
{% if x is defined and x %}a{% endif %}{% if messages and messages[0].role == 'user' %}u{% endif %}
{%- for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + '</s>' }}{% endfor %}
{{ 'a,b,c'.split(',', true) }}{{ 'a,b,c'.split(',', -3) }}{{ 'a,b,c'.split(',', 0) }}{{ 'aXbX'.replace('X', 'y', true) }}{{ 'aXbX'.replace('X', 'y', -1) }}
{{ 'a'.split(',', 'b') }}
{{ 'a'.replace('a', 'b', 1.5) }}
{{ (1, 2)[0] }}{{ 'a'.upper().lower() }}{{ [[1, 2], [3]][0][1] }}{{ ('x' ~ 'y')|upper }}{{ {'a': [1, {'b': 'z'}]}.a[1].b }}
{% set m = {'role': 'x'} %}{{ m.role }}{% set l = [] %}{% set l = l + [1] %}{{ l }}
{%- set x = 'a' -%}   {{- x -}}   ¶
{% for i in range(3) -%}
    {{ i }}
{%- endfor %}
{{ none|selectattr('a')|list }}{{ none|map('upper')|list }}{{ 0|reject('odd')|list }}
{% if false %}{{ 1|nosuchfilter }}{% endif %}{{ 1 if true else 2 is nosuchtest }}
{{ 1_000 }} {{ 3.0|string }} {{ 'é'|upper }} {{ 'ÀÉ'|lower }}
{% set loop_messages = messages[1:] if messages[0]['role'] == 'system' else messages %}{{ loop_messages|length }}
{{ raise_exception('no: ' ~ 1) }}
{{ nothing.attr }}
{{ nothing['x'] }}
{{ 1 + 'a' }}
{{ nothing + 'a' }}
{{ nosuch(1) }}
{{ 'a'|nosuchfilter }}
{{ 'a' is nosuchtest }}
{% nosuchtag %}
{% if true %}
{{ (1 }}
{{ 1 / 0 }}
{{ 'abc' < 1 }}
{{ }}
{% for x in 5 %}{% endfor %}
{{ [].append(1) }}
{{ 'a' ¶
{# open
{% set 1 = 2 %}
{{ none.x.y }}
{% break %}
""".strip("\n").replace("¶", "")  # the mark keeps spaces at the end of a line


class Refused(Exception):
    pass


def refuse(message):
    raise Refused(message)


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_out"), [], [], body).set_lineno(line)

    def _out(self, caller):
        return caller()


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda f: datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(f)
    return env


def render(source, messages, prompt, extra={}):
    try:
        t = environment().from_string(source)
        text = t.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", **extra)
        return {"text": text}
    except Refused as e:
        return {"refused": str(e)}
    except Exception as e:
        return {"error": type(e).__name__ + ": " + str(e)}


def one(name, source, out_dir):
    cases = []
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            cases.append({"messages": messages, "prompt": prompt, **render(source, messages, prompt)})
    for thinking in (False, True):
        if "enable_thinking" in source:
            cases.append({"messages": CONVERSATIONS[0], "prompt": True, "thinking": thinking,
                          **render(source, CONVERSATIONS[0], True, {"enable_thinking": thinking})})
    with open(os.path.join(out_dir, name + ".json"), "w", encoding="utf-8", newline="\n") as f:
        json.dump({"source": source, "cases": cases}, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")


def language(out_dir):
    """One line a piece; a piece goes on while lines are indented or it would not parse alone."""
    rows = []
    chunks = LANGUAGE.split("\n")
    joined = ["  {% if true %}  \n  indented\n  {% endif %}  \n  end", "{% if true +%}\nkept newline{% endif %}", "line{# c #}\nnext",
              "{% for i in range(3) -%}\n    {{ i }}\n{%- endfor %}", "{{ 'a' \n", "a\r\nb\rc\n", "x\n", "x\n\n", "", "  {% if 1 %}\n  {% endif %}\n"]
    for c in joined:
        for line in c.split("\n"):
            if line in chunks:
                chunks.remove(line)
    for source in chunks + joined:
        rows.append({"source": source, **render(source, CONVERSATIONS[1], True)})
    with open(os.path.join(out_dir, "language.json"), "w", encoding="utf-8", newline="\n") as f:
        json.dump({"messages": CONVERSATIONS[1], "now": NOW, "cases": rows}, f, ensure_ascii=False, indent=0)
        f.write("\n")


def main():
    args = [a for a in sys.argv[1:] if a != "--all"]
    template_dir, *ggufs, out_dir = args
    os.makedirs(out_dir, exist_ok=True)
    names = []
    for path in sorted(glob.glob(os.path.join(template_dir, "*.jinja"))):
        name = os.path.basename(path)[:-6]
        if name in KEEP or "--all" in sys.argv:
            one(name, open(path, encoding="utf-8").read(), out_dir)
    for path in ggufs:
        import gguf
        field = gguf.GGUFReader(path).fields.get("tokenizer.chat_template")
        if not field: # a base model
            continue
        source = field.contents()
        one("file-" + os.path.basename(path).rsplit(".", 1)[0], source, out_dir)
    language(out_dir)


main()
