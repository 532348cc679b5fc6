# SPDX-License-Identifier: Apache-2.0
"""The experiment's page and figures follow from its result."""

import pytest

pytest.importorskip("transformers")

from bench.experiment import page
from seer_cuda.integrations.transformers import _study


def made_up_result():
    """A result with every part that the page reads."""
    row = {"rule": "density", "kept": 0.1, "perplexity": 3.0, "late_ratio": 1.0, "windows": 2}
    ratio = {"ratio": 1.01, "ratio_error": 0.001, "recall": 0.9, "mass": 0.95, "target": None}
    band = {"seeds": [1.005, 1.015], "ratio_low": 1.005, "ratio_high": 1.015}
    band |= {"values": [2e-3, 3e-3]}
    rows = [row | ratio | {"method": "dense", "value": 1.0}]
    rows += [
        row | ratio | {"method": method, "value": density}
        for density in (0.5, 0.1)
        for method in _study.BASELINES
    ]
    rows += [
        row | ratio | band | {"method": "learned gate", "value": density} for density in (0.5, 0.1)
    ]
    at = {"value": 2e-3, "method": "learned gate", "recall": None, "target": 0.1}
    rows += [row | ratio | band | at | {"rule": rule} for rule in ("threshold", "topp")]
    met = {"ratio": 1.002, "kept": 0.11, "ratio_low": 1.001, "ratio_high": 1.002}
    met["seeds"] = [1.001, 1.002]
    adaptive = [
        row | ratio | {"method": method, "rule": rule, "target": density} | extra
        for density in (0.5, 0.1)
        for method, rule, extra in (
            ("learned gate", "topp", band | met),
            ("oracle", "threshold", {}),
            ("random", "density", {}),
        )
    ]
    files = {"package": "one", "files": 3, "characters": 1000, "tokens": 300}
    pair = {"gain": 1e-3, "error": 1e-4, "better": 2, "windows": 2}
    pairs = [pair | {"method": "random", "density": density} for density in (0.5, 0.1)]
    times = {"tokens": 32768, "attention_ms": 60.0, "share": 0.6, "peak_gib": 1.0, "model": "m"}
    curve = [[10.0 * n, 2048.0 if n < 5 else 8192.0, 9.0 - n] for n in range(8)]
    return {
        "gpu": "Some GPU",
        "torch": "2",
        "date": "2026-01-01",
        "settings": {
            "heads": [12, 4],
            "head_dim": 64,
            "layers": 8,
            "context": 32768,
            "gate": "Qmax_Kmaxavg",
            "gate_dim": 32,
            "cache": 7,
            "distil_batch": 8,
            "distil_lr": 0.005,
            "validation_windows": 4,
            "phases": [[2048, 0.5], [8192, 0.5]],
        },
        "seconds": {"corpus": 10.0, "train": 100.0},
        "corpus": {
            "vocabulary": 8192,
            "splits": {name: [files] for name in ("train", "validation", "test")},
        },
        "train": {"parameters": 6e7, "steps": 9, "tokens": 10**6, "seconds": 60.0, "curve": curve},
        "distil": {"0": {"steps": 4, "tokens": 10**5, "seconds": 9.0, "curve": [[1, 2], [2, 1]]}},
        "eval": {
            "rows": rows,
            "adaptive": adaptive,
            "paired": {"count": pairs, "mean": [one | {"gain": -one["gain"]} for one in pairs]},
        },
        "variants": {"Qmax_Kmax": {"steps": 4, "seconds": 9.0, "curve": [[1, 2], [2, 1]]}},
        "prefill_date": "2025-12-31",
        "times": [
            {"layer": 0, "density": d, "dense_ms": 3.0, "gate_ms": 0.2, "sparse_ms": d}
            for d in (0.5, 0.1)
        ],
        "prefill": [
            times | {"attention": "SDPA, cuDNN", "ms": 100.0},
            times | {"attention": "gates", "ms": 50.0, "attention_ms": 10.0, "kept": 0.1},
        ],
    }


def test_the_page_is_made_of_the_result(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    text = page.generated(page.PAGE.read_text(), made_up_result())
    assert "| learned gate | **1.0100 +- 0.0010** (1.0050 to 1.0150) |" in text
    assert "sparsity, a ratio of at most 1.003: missed by all 2 seeds (1.0050 to 1.0150, 10" in text
    assert "sparsity, a ratio of at most 1.05: met by all 2 seeds" in text
    assert "the gate is better in 2 of 2 comparisons" in text
    assert "| random | +1.00 +- 0.10 (2/2) |" in text
    met = "sparsity, a ratio of at most 1.003: met by all 2 seeds (1.0010 to 1.0020, 11.0% kept)"
    assert met in text.partition("At an equal mean density:")[2]
    assert "the gate is better in 0 of 2 comparisons" in text
    assert "| learned gate | 11.0%, top-p | 11.0%, top-p |" in text
    assert "| random | 10.0%, count | 10.0%, count |" in text
    assert "| 10% | threshold 0.002 | 10.0% | **1.0100" in text
    assert "| 10% | top-p 0.998 | 10.0% | **1.0100" in text
    assert "| random | -1.00 +- 0.10 (2/2) |" in text
    assert "Measured 2025-12-31:" in text and "- Another form of gate, `Qmax_Kmax` with" in text
    assert "- Gates: `Qmax_Kmaxavg` with 32 channels, 1 seeds; each has 7 windows" in text
    assert "| m | 32k | gates, 10.0% kept | 50 | 10 | 60% | 2.00x | 6.00x |" in text
    assert page.generated(text, made_up_result()) == text
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    page.draw(made_up_result(), tmp_path / "none")
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {f"experiment_{name}" for name in page.FIGURES if name != "mask"}


def test_the_page_shows_the_present_result():
    if page.newest() is None:
        pytest.skip("no result is kept")
    assert page.main(page.RESULTS, check=True) == 0
