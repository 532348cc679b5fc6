# SPDX-License-Identifier: Apache-2.0
"""What this build holds and what of it serves this machine (``python -m seer_cuda info``)."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch

from seer_cuda import _composite, _library
from seer_cuda._version import __version__

#: Every operator of ``torch.ops.seer``.
OPS = (
    "block_sparse_attn",
    "attn_pool",
    "pool_gate",
    "gate_scores",
    "gate_select",
    "pack_block_bits",
    "unpack_block_bits",
    "block_bits_from_indices",
)
_COMPILED = {"CPU": "C++ kernel", "CUDA": "CUDA kernel"}


def collect() -> dict[str, Any]:
    """Versions, devices, the ops on each device, and the compiled kernels each GPU would use."""
    core = _library.load_core()
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    about: dict[str, Any] = {
        "version": __version__,
        "library": str(_library.library_path()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "build": core.build_info() if core else None,
        "ops": [_op(op, core, gpus) for op in OPS],
        "kernels": [],
    }
    for gpu in gpus if core else []:
        # The commonest problem: if even that has no kernel, the reason concerns the GPU.
        gpu["refusal"] = core.explain("block_sparse_attn", gpu["sm"], "bfloat16", 128, 64, 64)
    if core:
        sms = [gpu["sm"] for gpu in gpus]
        about["kernels"] = [_kernel(core, variant, sms) for variant in core.variants()]
    return about


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _op(op: str, core: Any, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    row = {"op": op, "cpu": _implementation(op, "CPU")}
    for gpu in gpus:
        row[gpu["device"]] = _on_gpu(op, core, gpu["sm"])
    return row


def _implementation(op: str, key: str) -> str:
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"seer::{op}", key):
        return _COMPILED[key]
    return "none"


def _on_gpu(op: str, core: Any, sm: int) -> str:
    """How an op runs on a GPU, or why it does not."""
    how = _implementation(op, "CUDA")
    if core is None or how != _COMPILED["CUDA"]:
        return how
    otherwise = "torch operations" if op in _composite.fallback_ops() else ""
    if not core.build_info()["cuda"]:
        return otherwise or "none: built without CUDA"
    variants = [v for v in core.variants() if v["op"] == op]
    if not variants:
        return how
    served = {_problem(v) for v in variants if _explain(core, v, sm) == ""}
    if not served:
        return otherwise or f"none: no kernel for sm_{sm}"
    return f"{how}, {len(served)} shapes" + (f"; else {otherwise}" if otherwise else "")


def _problem(variant: dict[str, Any]) -> tuple[Any, ...]:
    # Kernels without a block size of their own serve all of them, None here.
    return variant["op"], variant["dtype"], variant["head_dim"], variant.get("block_q")


def _explain(core: Any, variant: dict[str, Any], sm: int) -> str:
    op, dtype, head_dim, block_q = _problem(variant)
    return core.explain(op, sm, dtype, head_dim, block_q or 64, variant.get("tile_kv", 64))


def _kernel(core: Any, variant: dict[str, Any], sms: list[int]) -> dict[str, Any]:
    """One compiled kernel, and which of the machine's GPUs would run it."""
    same = [
        v for v in core.variants() if v["op"] == variant["op"] and _problem(v) == _problem(variant)
    ]
    used_on = []
    for index, sm in enumerate(sms):
        # sm_80 kernels run on every later GPU, the others on the one architecture they name; the
        # most specific one is taken.
        able = [v["sm"] for v in same if v["sm"] in (80, sm)]
        if _explain(core, variant, sm) == "" and variant["sm"] == max(able, default=0):
            used_on.append(f"cuda:{index}")
    return {**variant, "used_on": used_on}


def as_json(about: dict[str, Any]) -> str:
    """The whole description."""
    return json.dumps(about, indent=2)


def as_text(about: dict[str, Any]) -> str:
    """Plain text in columns, the same on a terminal and in a file."""
    build = about["build"]
    cuda = f"CUDA {about['torch_cuda']}" if about["torch_cuda"] else "without CUDA"
    pairs = [
        ("seer_cuda", about["version"]),
        ("library", about["library"]),
        ("built", _build_text(build)),
        ("torch", f"{about['torch']} ({cuda})"),
        ("python", about["python"]),
        ("cpu", f"{about['cpu_threads']} threads"),
    ]
    for gpu in about["gpus"]:
        text = f"{gpu['name']}, sm_{gpu['sm']}, {gpu['memory_gib']} GiB"
        pairs.append((gpu["device"], text))
    if not about["gpus"]:
        pairs.append(("gpu", _no_gpu_text(about)))
    lines = [f"{name:<10} {value}" for name, value in pairs]

    devices = ["cpu", *(gpu["device"] for gpu in about["gpus"])]
    rows = [[row["op"], *(row[device] for device in devices)] for row in about["ops"]]
    lines += ["", *_columns([["op", *devices], *rows])]
    for gpu in about["gpus"]:
        if gpu.get("refusal"):
            lines += ["", f"block_sparse_attn on {gpu['device']}: {gpu['refusal']}"]
    if about["kernels"]:
        header = ["compiled kernel", "registers", "smem", "used on"]
        kernels = [
            [k["name"], _registers(k), str(k.get("smem_bytes", "-")), _used(k)]
            for k in about["kernels"]
        ]
        lines += ["", *_columns([header, *kernels])]
    return "\n".join(lines)


def _build_text(build: dict[str, Any] | None) -> str:
    if build is None:
        return "unknown: seer_cuda._core was not built for this Python (everything else works)"
    if not build["cuda"]:
        return f"{build['compiler']}, without CUDA (no nvcc at build time): CPU kernels only"
    archs = build["archs"] if isinstance(build["archs"], str) else ";".join(build["archs"])
    return f"{build['compiler']}, CUDA {build['cuda_version']}, architectures {archs}"


def _no_gpu_text(about: dict[str, Any]) -> str:
    if about["torch_cuda"] is None:
        return "none: this torch was built without CUDA"
    return "none: torch sees no CUDA device"


def _registers(kernel: dict[str, Any]) -> str:
    return ", ".join(f"{n} ({arch})" for arch, n in kernel["registers"].items()) or "-"


def _used(kernel: dict[str, Any]) -> str:
    return ", ".join(kernel["used_on"]) or "-"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [padded[0], "-" * len(padded[0]), *padded[1:]]
