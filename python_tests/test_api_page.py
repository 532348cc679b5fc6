# SPDX-License-Identifier: Apache-2.0
"""docs/api.md names what the package has."""

import seer_cuda
from tools import api_page


def test_the_page_is_of_this_package(capsys, monkeypatch, tmp_path):
    text = api_page.page()
    assert all(f"seer_cuda.{name}" in text for name in seer_cuda.__all__ if name != "__version__")
    assert "`seer_cuda.gate_select(q_gate, k_gate, *, method='threshold', value" in text
    assert api_page.main(["--check"]) == 0, "python tools/api_page.py writes docs/api.md"
    monkeypatch.setattr(api_page, "PAGE", tmp_path / "api.md")
    api_page.PAGE.write_text(text + "more")
    assert api_page.main(["--check"]) == 1 and "stale" in capsys.readouterr().err
    assert api_page.main([]) == 0 and api_page.PAGE.read_text() == text
