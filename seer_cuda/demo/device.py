# SPDX-License-Identifier: Apache-2.0
"""Where the demo runs: a CUDA device whose kernels work, or the CPU."""

from __future__ import annotations

import torch

import seer_cuda


class DeviceError(RuntimeError):
    """The device asked for cannot run the demo; the message says why."""


def choose(wanted: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises:
        DeviceError: "cuda" was asked for and cannot run the sparse attention kernel.
    """
    if wanted == "cpu":
        return "cpu"
    reason = cuda_problem()
    if reason is None:
        return "cuda"
    if wanted == "cuda":
        raise DeviceError(f"--device cuda: {reason} Use --device cpu.")
    return "cpu"


def cuda_problem() -> str | None:
    """Why the current CUDA device cannot run the demo, or None if it can: one small call tells."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device."
    x = torch.zeros(1, 64, 1, 64, dtype=torch.bfloat16, device="cuda")
    try:
        seer_cuda.block_sparse_attn(x, x, x)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{torch.cuda.get_device_name()} cannot run the kernel: {error}"
    return None


def describe(device: str) -> str:
    """For the first line of the output."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
