# SPDX-License-Identifier: Apache-2.0
"""``python -m seer_cuda demo``: the method end to end on real text, in minutes.

text -> train (a small language model) -> distil (its gates) -> evaluate (against the oracle, a
window and chance) -> report. `seer_cuda.demo.run.run` ties them together.
"""
