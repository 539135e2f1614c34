"""What all fault tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.disturbed import leave_out_drawing


@pytest.fixture(autouse=True, scope="module")
def no_drawing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_drawing(patch)
        yield
