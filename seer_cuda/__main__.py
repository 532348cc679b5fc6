# SPDX-License-Identifier: Apache-2.0
"""``python -m seer_cuda``."""

from seer_cuda.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
