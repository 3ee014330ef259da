"""Parity as a gate: an export beside its checkpoint, and an artifact beside its golden vectors."""

from vtr_export.verify.export import Outcome, verify_export
from vtr_export.verify.golden import verify_artifact
from vtr_export.verify.overflow import check_range
from vtr_export.verify.scope import check_scope, choose_scope

__all__ = [
    "Outcome",
    "check_range",
    "check_scope",
    "choose_scope",
    "verify_artifact",
    "verify_export",
]
