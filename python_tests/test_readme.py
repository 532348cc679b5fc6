# SPDX-License-Identifier: Apache-2.0
"""README's first Python example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_first_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "BlockMask(" in printed and "torch.Size([1, 2048, 8, 128])" in printed
