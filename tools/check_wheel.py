# SPDX-License-Identifier: Apache-2.0
"""Check a built wheel: both binaries inside, a tag for one Python and one platform, size within
the limit. Whether it works is tools/check_install.py's question.

python tools/check_wheel.py dist/*.whl
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

LIMIT_MB = 40.0
BINARIES = ("seer_cuda/libseer_ops.so", "seer_cuda/_core.")


def problems(wheel: Path) -> list[str]:
    """One line per thing wrong with a wheel."""
    found = []
    size = wheel.stat().st_size / 1e6
    if size > LIMIT_MB:
        found.append(f"{wheel.name}: {size:.1f} MB, allowed {LIMIT_MB:.0f}")
    # _core is for one Python, both binaries for one platform; "none-any" would install anywhere.
    if not re.search(r"-(cp3\d+)-\1-linux_\w+\.whl$", wheel.name):
        found.append(f"{wheel.name}: expected a tag such as cp311-cp311-linux_x86_64")
    names = zipfile.ZipFile(wheel).namelist()
    for binary in BINARIES:
        if not any(name.startswith(binary) for name in names):
            found.append(f"{wheel.name}: {binary}* is missing")
    return found


def main(argv: list[str]) -> int:
    """Exit status 1 if a wheel is wrong or none is given."""
    if not argv:
        print("tools/check_wheel.py: expected a wheel")
        return 1
    found = []
    for path in map(Path, argv):
        found += problems(path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB of {LIMIT_MB:.0f}")
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
