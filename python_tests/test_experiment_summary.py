# SPDX-License-Identifier: Apache-2.0
"""bench.experiment.summary: which adaptive rule counts, and what is paired with what."""

import json
import math
from dataclasses import asdict, replace

import pytest

pytest.importorskip("transformers")

from bench.experiment import evaluate, results, summary
from bench.experiment.settings import TINY
from seer_cuda.integrations.transformers import _study

VARIANT = "Qmaxminavg_Kmaxminavg"
SETTINGS = replace(TINY, densities=(0.5,), seeds=(0, 1), variants=(VARIANT,))
GATE, ORACLE = _study.GATE, _study.ORACLE
SHARED = [method for method in _study.BASELINES if method not in ("sink + local", "random")]


def write(folder, group, split, methods, losses, window_loss=1.0):
    """losses: of (method, way) above the dense model's; ways "density", "threshold", "topp"."""
    with (folder / f"points_{group}_{split}.jsonl").open("w") as file:
        for window in (0, 1):
            dense = window_loss + window
            found = [_study.Point(window, "dense", "density", 1.0, dense, dense)]
            for method in methods:
                for way in ("density", "threshold", "topp"):
                    loss = losses(method, way, window)
                    if loss is None:
                        continue
                    target = None if way == "density" else 0.5
                    value = 0.5 if way == "density" else 0.01
                    total = dense + loss
                    point = _study.Point(
                        window, method, way, value, total, total, 0.4, target=target
                    )
                    found.append(point)
            line = {"window": window, "points": [asdict(one) for one in found]}
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def folder(tmp_path):
    """Validation likes top-p for the gate and thresholds for all else; the test the contrary."""

    def baselines(split):
        def loss(method, way, window):
            if method not in SHARED and way != "density":
                return None
            likes = "threshold" if split == "validation" else "topp"
            return {"density": 0.3, likes: 0.1}.get(way, 0.2) + 0.01 * window

        return loss

    def gate(split, seed):
        def loss(method, way, window):
            likes = "topp" if split == "validation" else "threshold"
            return {"density": 0.25, likes: 0.05}.get(way, 0.15) + 0.02 * seed

        return loss

    for split in ("validation", "test"):
        write(tmp_path, "baselines", split, _study.BASELINES, baselines(split))
        for seed in (0, 1):
            write(tmp_path, str(seed), split, [GATE], gate(split, seed))
        write(tmp_path, VARIANT, split, [GATE], gate(split, 2))
    return tmp_path


def test_validation_alone_chooses_the_rule(folder):
    found = summary.summary(folder, SETTINGS)
    rules = {row["method"]: row["rule"] for row in found["adaptive"]}
    assert rules[GATE] == rules[summary.variant(VARIANT)] == "topp"
    assert {rules[method] for method in SHARED} == {"threshold"}
    assert rules["random"] == rules["sink + local"] == "density"
    assert {row["target"] for row in found["adaptive"]} == {0.5}
    gate = next(row for row in found["adaptive"] if row["method"] == GATE)
    assert gate["seeds"] == pytest.approx([math.exp(0.15), math.exp(0.17)])
    assert gate["values"] == [0.01, 0.01]


def test_the_gate_is_paired_with_the_chosen_rules(folder):
    found = summary.summary(folder, SETTINGS)["paired"]
    gains = {
        way: {row["method"]: (row["gain"], row["better"]) for row in rows}
        for way, rows in found.items()
    }
    # Mean of the seeds 0.26 by count, 0.16 by the mean; the baselines' windows differ by 0.01.
    for method in _study.BASELINES:
        assert gains[summary.COUNT][method] == (pytest.approx(0.305 - 0.26), 2)
    assert gains[summary.MEAN]["antidiagonal"] == (pytest.approx(0.205 - 0.16), 2)
    assert gains[summary.MEAN]["random"] == (pytest.approx(0.305 - 0.16), 2)


def test_the_result_needs_no_more_than_the_first_seed(folder, monkeypatch):
    (folder / "done").mkdir()
    for name in ("eval_0", "eval_baselines"):
        (folder / "done" / f"{name}.json").write_text('{"seconds": 1.0}')
    (folder / "times.json").write_text("[]")
    (folder / results.EXAMPLE).write_bytes(b"")
    kept = folder / "kept"
    kept.mkdir()
    monkeypatch.setattr(results, "RESULTS", kept)
    monkeypatch.setattr(results, "device_name", lambda: "Some GPU")
    last = {"date": "2026-01-01", "prefill": [{"ms": 1.0}]}
    (kept / "some_gpu.json").write_text(json.dumps(last))
    path = results.collect(folder, folder / "out", SETTINGS, "2026-02-02")
    found = json.loads(path.read_text())
    gate = [row for row in found["eval"]["rows"] if row["method"].startswith(GATE)]
    assert {row["method"] for row in gate} == {GATE} and len(gate[0]["seeds"]) == 1
    assert (found["prefill"], found["prefill_date"]) == (last["prefill"], "2026-01-01")
    assert evaluate.groups(SETTINGS) == ["0", "baselines", "1", VARIANT]
