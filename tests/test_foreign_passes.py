"""Golden rewrites of decoders that others exported; before and after compute the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Golden
from graph_texts import Array, Session, load, normal
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from vtr_export.errors import AnalysisError, InputError
from vtr_export.passes.canonical_attention import CanonicalAttention
from vtr_export.passes.derive_vision_index import DeriveVisionIndex
from vtr_export.passes.hide_keys import HideKeys
from vtr_export.passes.lift_embeddings import LiftEmbeddings
from vtr_export.passes.lower_embeddings import LowerEmbeddings
from vtr_export.passes.name_caches import NameCaches
from vtr_export.passes.name_inputs import NameInputs
from vtr_export.passes.narrow_shapes import NarrowShapes
from vtr_export.passes.plain_reshapes import PlainReshapes
from vtr_export.passes.raise_opset import RaiseOpset
from vtr_export.passes.unflatten_tables import UnflattenTables
from vtr_export.passes.unfuse_skip_norms import UnfuseSkipNorms

GRAPHS = Path(__file__).parents[1] / "graphs"
IMAGE = 7
PASSES: dict[str, Callable[[], ir.passes.InPlacePass]] = {
    "canonical_attention": CanonicalAttention,
    "derive_vision_index": lambda: DeriveVisionIndex(IMAGE),
    "hide_keys": lambda: HideKeys((1, 2)),
    "lift_embeddings": LiftEmbeddings,
    "name_caches": NameCaches,
    "name_inputs": NameInputs,
    "narrow_shapes": NarrowShapes,
    "plain_reshapes": PlainReshapes,
    "raise_opset": lambda: RaiseOpset(24),
    "unflatten_tables": UnflattenTables,
    "unfuse_skip_norms": UnfuseSkipNorms,
}
CASES = [f"{name}/{case.name}" for name in PASSES for case in sorted((GRAPHS / name).iterdir())]
SIZES = {"batch": 2, "sequence": 3, "past": 4, "total": 7, "vision": 2}
SIZES |= {"b": 2, "b2": 2, "s": 3, "p": 4, "t": 7}
RENAMED = {"hidden_states": "inputs_embeds"}


def rewritten(case: str) -> ir.Model:
    name = case.partition("/")[0]
    model = load(GRAPHS / case / "before.onnxtxt")
    for step in (PASSES[name](), RemoveUnusedNodesPass(), TopologicalSortPass()):
        step(model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_form_becomes_its_golden(case: str, golden: Golden) -> None:
    golden(rewritten(case), GRAPHS / case / "after.onnxtxt")
    assert {path.name for path in (GRAPHS / case).iterdir()} == {"before.onnxtxt", "after.onnxtxt"}


def feeds(batch: int = 2) -> dict[str, Array]:
    """What both sides are asked, by name: causal, all real."""
    causal = np.arange(7) <= np.arange(4, 7)[:, None]
    visible = np.broadcast_to(causal, (2, 1, 3, 7))
    known: dict[str, Array] = {
        "padding": np.ones((2, 1, 3, 7), bool),
        "mask": visible,
        "added": np.where(visible, 0, -1e9).astype(np.float32),
        "attention_mask": np.ones((2, 7), np.int64),
        "position_ids": np.broadcast_to(np.arange(4, 7), (2, 3)),
        "visible.0": np.ones((2, 7), np.int64),
        "visible.1": np.ones((2, 7), np.int64),
        "seqlens_k": np.array([6, 6], np.int32),
        "total_sequence_length": np.array([7], np.int32),
        "input_ids": np.array([[IMAGE, 1, IMAGE], [2, IMAGE, IMAGE]]),
        "vision_index": np.array([[0, 2], [1, 2]]),
        "vision_mask": np.array([[True, False, True], [False, True, True]]),
    }
    one_for_all = ("total_sequence_length",)
    return {n: value if n in one_for_all else value[:batch] for n, value in known.items()}


def fed(session: Session, known: dict[str, Array], batch: int = 2) -> dict[str, Array]:
    """Known inputs as the graph types them; others drawn, the same for a name on both sides."""
    given = {}
    for name, value in session.inputs.items():
        sizes = SIZES | {"batch": batch}
        shape = [int(sizes.get(dim, dim)) for dim in value.shape]
        if name not in known:
            known[name] = normal(*shape, seed=len(known))
        is_narrow = value.type == "tensor(int32)"
        given[name] = known[name].astype(np.int32) if is_narrow else known[name]
    return session(given)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("name_caches")])
def test_before_and_after_compute_the_same(case: str) -> None:
    model = rewritten(case)
    LowerEmbeddings()(model)
    batch = 1 if "seqlens_k" in (GRAPHS / case / "before.onnxtxt").read_text() else 2
    before, after = Session(load(GRAPHS / case / "before.onnxtxt")), Session(model)
    known = feeds(batch)
    expected = fed(before, known, batch)
    for old, new in RENAMED.items():
        if old in known and new in after.inputs:
            known[new] = known[old]
    found = fed(after, known, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)


def test_a_cache_in_one_tensor_becomes_two() -> None:
    case, known = "name_caches/merged", feeds()
    before, after = Session(load(GRAPHS / case / "before.onnxtxt")), Session(rewritten(case))
    expected = fed(before, known)
    known["past_key_values.0.key"], known["past_key_values.0.value"] = known["cache_0"]
    found = fed(after, known)
    np.testing.assert_array_equal(found["heads"], expected["heads"])
    both = np.stack([found["present.0.key"], found["present.0.value"]])
    np.testing.assert_array_equal(both, expected["cache_0_after"])


@pytest.mark.parametrize("case", CASES)
def test_a_second_time_changes_nothing(case: str) -> None:
    model = rewritten(case)
    was = ir.to_onnx_text(model)
    assert not PASSES[case.partition("/")[0]]()(model).modified
    assert ir.to_onnx_text(model) == was


def test_what_a_pass_cannot_do_it_leaves() -> None:
    old = load(GRAPHS / "raise_opset" / "reductions" / "before.onnxtxt")
    old.opset_imports[""] = 12
    with pytest.raises(AnalysisError, match="opset 12"):
        RaiseOpset(24)(old)
    cut = load(GRAPHS / "derive_vision_index" / "ids" / "before.onnxtxt")
    cut.graph.inputs[0].name = "tokens"
    with pytest.raises(InputError, match="input_ids"):
        DeriveVisionIndex(IMAGE)(cut)
