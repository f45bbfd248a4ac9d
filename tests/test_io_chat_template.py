"""Chat templates: what they are given, and that hostile ones are stopped."""

import shutil
import subprocess
import time

import pytest
from io_files import byte_level, made

from pyarch.io import chat_template

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi {{ 7 }}"}, {"role": "assistant", "content": "Yo"}]


def test_chat():
    tokenizer = made(byte_level(**{"tokenizer.chat_template": CHATML}))
    said = "<|im_start|>user\nHi {{ 7 }}<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert tokenizer.chat(MESSAGES) == said + "<|im_start|>assistant\n"
    assert tokenizer.chat(MESSAGES, add_generation_prompt=False) == said
    tokenizer.chat_template = "{{ bos_token }}|{{ eos_token }}|{{ thinking }}|{{ tools is defined }}"
    assert tokenizer.chat(MESSAGES, thinking=True) == "<|x|>|<|x|>|True|False"
    with pytest.raises(ValueError, match="has no chat template"):
        made(byte_level()).chat(MESSAGES)
    for wrong in ("hi", [{"content": "x"}], [1], None, {"role": "user"}):
        with pytest.raises(ValueError, match="messages"):
            tokenizer.chat(wrong)
    with pytest.raises(ValueError, match="messages: must be plain"):
        tokenizer.chat([{"role": "user", "content": object()}])


def test_templates_have_what_hugging_face_gives_them():
    template = (
        "{%- for m in messages %}\n  {%- if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}\n{%- endfor %}\n"
        "  {% if true %}\nY{% endif %}{{ strftime_now('%Y') }}"
    )
    text = chat_template.render(template, {"messages": [{"a": "é<"}, {}]})
    assert text == '{"a": "é<"}Y' + time.strftime("%Y")


def test_what_is_preloaded_here_does_not_count_there(monkeypatch):
    """A sanitizer in LD_PRELOAD reserves terabytes of addresses, far beyond the limit."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler, which has a sanitizer")
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    monkeypatch.setenv("LD_PRELOAD", found.stdout.strip())
    assert chat_template.render("{{ 1 + 1 }}", {}) == "2"


HOSTILE = {
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "undefined": ("{{ a.b.c }}", "UndefinedError"),
    "escape by class": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "escape by function": ("{{ raise_exception.__globals__.x }}", "SecurityError|Undefined"),
    "escape by format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "SecurityError"),
    "escape by attr": ("{{ (messages|attr('__class__')).x }}", "SecurityError|UndefinedError"),
    "change of messages": ("{{ messages.append(1) }}", "SecurityError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "big string": ("{{ 'a' * 10**10 }}", "needs more than"),
    "big padding": ("{{ 'a'|center(10**10) }}", "needs more than"),
    "big range": ("{{ range(10**9)|list }}", "OverflowError"),
    "doubling": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "needs more than",
    ),
    "long output": ("{% for i in range(99999) %}{{ 'abcdefgh' * 1000 }}{% endfor %}", "makes more than"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "was stopped|took more than",
    ),
    "deep": ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "RecursionError|needs more than|was stopped"),
    "include": ("{% include '/etc/passwd' %}", "TypeError|TemplateNotFound|no loader"),
    "import": ("{% import 'os' as os %}", "TypeError|TemplateNotFound|no loader"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_stopped(case):
    template, says = HOSTILE[case]
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"^chat template: .*({says})"):
        chat_template.render(template, {"messages": MESSAGES})
    assert time.monotonic() - started < 2 * chat_template.SECONDS + 1
