"""The prompt that OpenGVLab's ``conversation.py`` writes, as a chat template; it is not run."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vtr_export.layouts.tokens import token_ids

Config = Mapping[str, Any]
CONVERSATION: Final = "conversation.py"
# {name: literal} are filled in; a system message of the conversation stands for the published one
_BETWEEN: Final = """{% set system = namespace(text={system}) %}\
{% for message in messages if message['role'] == 'system' %}\
{% set system.text = message['content'] %}{% endfor %}\
{{ {before} + system.text + {after} + {sep} }}\
{% for message in messages if message['role'] != 'system' %}\
{{ ({user} if message['role'] == 'user' else {assistant}) + {colon} }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}\
{{ {sep} if message['role'] == 'user' else {sep2} }}\
{% endfor %}\
{% if add_generation_prompt %}{{ {assistant} + {ask} }}{% endif %}"""


def end_token(own: Config, folder: Path) -> int | None:
    """The id of what ends an answer: the template's separator."""
    found = _conversation(folder, own) or {}
    ends = found.get("sep2") or found.get("sep") or ""
    return token_ids(folder).get(ends.strip())


def template(own: Config, folder: Path) -> str | None:
    """What ``get_prompt`` writes; None where no conversation is found, or for another style."""
    found, system = _conversation(folder, own) or {}, own.get("system_message")
    style, sep = found.get("sep_style"), found.get("sep")
    before, _, after = str(found.get("system_template", "{system_message}")).partition(
        "{system_message}"
    )
    styles = {"MPT": ("", "", sep), "INTERNVL_ZH": (": ", ":", found.get("sep2"))}
    if style not in styles or not isinstance(sep, str) or not found.get("roles"):
        return None
    colon, ask, sep2 = styles[style]
    values = {
        "system": system if isinstance(system, str) else found.get("system_message", ""),
        "before": before,
        "after": after,
        "sep": sep,
        "user": found["roles"][0],
        "assistant": found["roles"][1],
        "colon": colon,
        "ask": ask,
        "sep2": sep2,
    }
    text = _BETWEEN
    for name, value in values.items():
        text = text.replace("{" + name + "}", json.dumps(value, ensure_ascii=False))
    return text


def _conversation(folder: Path, own: Config) -> dict[str, Any] | None:
    """The literals of ``Conversation(name=…)`` that the configuration names."""
    try:
        tree = ast.parse((folder / CONVERSATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Conversation":
            found = {word.arg: _literal(word.value) for word in node.keywords if word.arg}
            if found.get("name") == own.get("template"):
                return found
    return None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Attribute):
        return node.attr  # SeparatorStyle.MPT
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
