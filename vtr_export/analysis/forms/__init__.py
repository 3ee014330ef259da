"""The forms in which exporters write a decoder's attention, taken to pieces."""

from vtr_export.analysis.forms.find import find_forms
from vtr_export.analysis.forms.form import Form, Mask, Rotary

__all__ = ["Form", "Mask", "Rotary", "find_forms"]
