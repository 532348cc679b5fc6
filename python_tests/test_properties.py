# SPDX-License-Identifier: Apache-2.0
"""Every op against the oracle on problems that hypothesis draws: shapes, strides, masks, dtypes.

The same few problems in every run (conftest's profile "seer"). More, and new ones each time:
`pytest python_tests/test_properties.py --hypothesis-profile=more`, with `--hypothesis-seed=N` to
repeat. For hours: tools/fuzz.py, which draws from the same place.
"""

import drawn_cases
import drawn_checks
import pytest
from hypothesis import given, note, strategies


@strategies.composite
def cases(draw, op, device):
    return drawn_cases.draw(drawn_cases.HypothesisSource(draw), op, device, most=200)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", drawn_cases.OPS)
@given(data=strategies.data())
def test_agrees_with_the_oracle(op, device, data):
    case = data.draw(cases(op, device))
    note(f"{case}")
    drawn_checks.check(case)
