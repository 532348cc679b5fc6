# SPDX-License-Identifier: Apache-2.0
"""The version: read by pyproject.toml, CMakeLists.txt and ``seer_cuda.__version__``."""

__version__ = "0.1.0"
