"""Every error a user can meet: a stable code, a place, and a way out."""

from typing import ClassVar


class VtrError(Exception):
    """Base of all errors caused by what the user gave us; anything else is our bug."""

    code: ClassVar[str] = "VTR000"

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.hint = message, where, hint

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        if self.where:
            lines.append(f"  --> {self.where}")
        if self.hint:
            lines.append(f"  help: {self.hint}")
        return "\n".join(lines)


class ScheduleError(VtrError):
    """The schedule is malformed or asks for the impossible."""

    code = "VTR001"


class CheckpointError(VtrError):
    """The model folder cannot be read: missing, truncated, corrupt, quantised, unsupported."""

    code = "VTR002"


class WeightError(VtrError):
    """A weight holds NaN, infinity, or leaves the range of the requested dtype."""

    code = "VTR003"


class CalibrationError(VtrError):
    """Questions cannot be read, or do not serve: no image, no answer, asked twice."""

    code = "VTR004"


class AnalysisError(VtrError):
    """A graph holds something the analysis cannot follow."""

    code = "VTR101"


class ArtifactError(VtrError):
    """The artifact is missing, damaged, of another version, or cannot be published."""

    code = "VTR201"


class InputError(VtrError):
    """An image, prompt or option given to a run does not fit the artifact."""

    code = "VTR202"


class EngineError(VtrError):
    """An engine cannot be built, was tampered with, or does not belong on this machine."""

    code = "VTR203"


class UnavailableError(VtrError):
    """Something that is not installed, or not present on this machine, is needed."""

    code = "VTR301"


class GateError(VtrError):
    """A parity gate failed: the exported graph does not say what the checkpoint says (exit 1)."""

    code = "VTR401"


class LedgerError(VtrError):
    """A search's ledger is not one, is of another search, in use, or cannot be written."""

    code = "VTR501"
