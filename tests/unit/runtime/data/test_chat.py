"""Conversations are rendered as transformers renders them; a template from elsewhere can do no harm."""

from __future__ import annotations

import json
import sys

import pytest

from onnx_woq.errors import DataError
from onnx_woq.runtime.data.chat import plain, renderer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message.role == "never" %}{{ raise_exception("no") }}{% endif %}
<|{{ message.role }}|>{{ message.content }}{{ eos_token }}
{% endfor %}"""
RENDERED = "<s><|user|>Hi</s>\n<|assistant|>Ho</s>\n"


def settings(folder, **found):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}} | found)
    )
    return renderer(folder)


def test_without_a_template_contents_stand_below_each_other(tmp_path):
    assert renderer(tmp_path) is plain
    assert settings(tmp_path, chat_template=[{"name": "rag", "template": "x"}]) is plain
    assert plain(CHAT) == "Hi\nHo"


@pytest.mark.parametrize("place", ["settings", "named", "file"])
def test_the_template_of_the_tokenizer(place, tmp_path):
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    found = {"settings": TEMPLATE, "named": [{"name": "default", "template": TEMPLATE}], "file": "other"}
    assert settings(tmp_path, chat_template=found[place])(CHAT) == RENDERED


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ raise_exception('roles') }}", "{{ messages[0].content.x.y }}", "{{ ''.__class__.__mro__ }}",
     "{{ messages.append(1) }}", "{% for i in range(10**9) %}x{% endfor %}"],
)  # fmt: skip
def test_a_template_that_fails_or_wants_out(template, tmp_path):
    render = settings(tmp_path, chat_template=template)
    with pytest.raises(DataError, match=r"the chat template in .* fails on these messages"):
        render(CHAT)


def test_jinja2_is_needed_only_to_render(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    render = settings(tmp_path, chat_template=TEMPLATE)
    with pytest.raises(DataError, match=r"needs jinja2: pip install 'onnx-woq\[chat\]'"):
        render(CHAT)
