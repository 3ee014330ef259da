"""What a search says where its extra is not installed."""

import sys
from collections.abc import Callable

import pytest

from vtr_export.errors import UnavailableError
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.latency import Times, fit
from vtr_export.search.psigmoid import fit_sigmoid

TIMES = Times(8.0, (3.0, 8.0), (4.0, 9.0))


@pytest.mark.parametrize(
    "needs_scipy",
    [lambda: fit_sigmoid(Candidate((8, 4, 2), Score(), 8)), lambda: fit(TIMES, 4)],
    ids=["sigmoids", "latency"],
)
def test_without_scipy_it_is_said_what_to_install(
    needs_scipy: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UnavailableError, match="'scipy', which is not installed") as caught:
        needs_scipy()
    assert caught.value.hint == "pip install 'vtr-export[search]'"
