# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: the cases, the timing protocol, the peers, and the record they write.

Run from the repository root: `python -m bench.record --help`. docs/benchmarks.md explains what is
timed and how.
"""
