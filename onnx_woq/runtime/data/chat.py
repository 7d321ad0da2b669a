"""Conversations: lists of messages as the text that a model sees, by the chat template beside its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from onnx_woq.errors import DataError
from onnx_woq.runtime.data.settings import read_settings

Render = Callable[[list[Any]], str]
"""`messages -> text`; a message is a dictionary with "role" and "content"."""

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def plain(messages: list[Any]) -> str:
    """Returns the contents of messages, one below the other: what is seen without a chat template."""
    return "\n".join(_content(message) for message in messages)


def renderer(folder: Path) -> Render:
    """Returns the function that renders messages by the chat template in a tokenizer's folder; `plain` without one.

    The template is chat_template.jinja, or the `chat_template` of tokenizer_config.json. It runs in the sandbox of
    jinja2, as it does in transformers. Rendering raises a DataError where jinja2 is not installed.
    """
    settings = read_settings(folder / "tokenizer_config.json")
    source = _template(folder, settings)
    tokens = {name: _token(settings.get(name)) for name in _TOKENS}
    return plain if source is None else partial(_rendered, folder, source, tokens)


def _rendered(folder: Path, source: str, tokens: dict[str, str], messages: list[Any]) -> str:
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise DataError(
            f"the chat template in {folder} needs jinja2: pip install 'onnx-woq[chat]', or give records with a field "
            '"text" instead of "messages"'
        ) from error
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    try:
        template = environment.from_string(source)
        return template.render(messages=messages, add_generation_prompt=False, tools=None, **tokens)
    except Exception as error:  # a template may raise anything
        raise DataError(f"the chat template in {folder} fails on these messages: {error}") from error


def _refuse(message: str) -> None:
    raise ValueError(message)


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Returns the source of the chat template, None if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, with names
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token(value: Any) -> str:
    """Returns the text of a special token, which settings give as it is or as an object."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _content(message: Any) -> str:
    """Returns the text of a message: its content, or that of the parts of it that are text."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise DataError(f'a message is not an object with "role" and "content": {str(message)[:80]}')
    return content
