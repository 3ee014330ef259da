"""The stored defaults of configurations, against the classes that are installed."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROOT = Path(__file__).parents[1]
SCRIPT, FILE = ROOT / "samples/support/defaults.py", ROOT / "vtr_export/families/defaults.json"
KEYS = {
    "sub_configs",
    "fixed",
    "absent",
    "optional",
    "aliases",
    "derived",
    "computed",
    "tied_by_text",
}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("defaults", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def test_the_file_is_what_the_classes_say(script: Any) -> None:
    assert FILE.read_text(encoding="utf-8") == script.text(), f"run python {SCRIPT}"
    assert FILE.stat().st_size < 300_000


def test_a_config_without_a_field_gets_the_stored_value(stored: dict[str, Any]) -> None:
    """An instance of each class, made of nothing, holds what the file says of it."""
    transformers.logging.set_verbosity_error()
    for name, fields in stored["types"].items():
        config = CONFIG_MAPPING[name]().to_dict()
        worked_out = {*fields.get("derived", {}), *fields.get("computed", [])}
        for field in (fields.keys() & config.keys()) - KEYS - worked_out:
            given = fields[field]
            if field == "sliding_window" and not fields.get("use_sliding_window", True):
                given = None  # switched off
            assert json.loads(json.dumps(config[field])) == given, f"{name}.{field}"
        for part, kind in fields.get("sub_configs", {}).items():
            if part not in fields.get("optional", []):
                assert config[part]["model_type"] == kind, f"{name}.{part}"


@pytest.mark.parametrize("seed", range(3))
def test_rules_hold_at_other_sizes(stored: dict[str, Any], seed: int) -> None:
    """Layer lists unroll to the class' own at a depth the script did not look at."""
    transformers.logging.set_verbosity_error()
    depth = random.Random(seed).choice([d for d in range(14, 45) if d not in (19, 32)])
    seen = 0
    for name, fields in stored["types"].items():
        for field, rule in fields.get("derived", {}).items():
            if not (isinstance(rule, dict) and "every" in rule):
                continue
            try:
                config = CONFIG_MAPPING[name](num_hidden_layers=depth)
            except Exception:  # some classes refuse a depth; each says so in its own way
                continue
            assert list(getattr(config, field)) == _unrolled(rule, depth), f"{name}.{field}"
            seen += 1
    assert seen > 60


def _unrolled(rule: dict[str, list[Any]], depth: int) -> list[Any]:
    first, every = rule.get("first", []), rule["every"]
    found = [
        first[n] if n < len(first) else every[(n - len(first)) % len(every)] for n in range(depth)
    ]
    for back, value in enumerate(reversed(rule.get("last", [])), 1):
        found[-back] = value
    return found


def test_every_architecture_is_there(stored: dict[str, Any]) -> None:
    assert len(stored["architectures"]) >= 97
    assert stored["architectures"].keys() <= stored["types"].keys()
    llava = stored["types"]["llava"]
    assert llava["absent"]["vision_config"]["hidden_size"] == 1024
    assert stored["types"]["llama"]["derived"]["num_key_value_heads"] == "num_attention_heads"
