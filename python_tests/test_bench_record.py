# SPDX-License-Identifier: Apache-2.0
"""The record's bookkeeping: counts, tables, figures."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch

from bench import figures, launch, overview, record, report, runner, timing
from bench.cases import Case, all_cases, case_of
from bench.checks import count_tests, sanitizer_errors
from bench.runner import row_of
from bench.timing import Timing

# ------------------------------------------------------------------------------------- the record


def row_of_case(case: Case, ms: float, **peers: float) -> dict:
    timings = {"seer_cuda": Timing(ms, 0.9 * ms, 0.01, 0.01)}
    timings |= {name: Timing(peer, peer, 0.01, 0.02) for name, peer in peers.items()}
    return row_of(case, 400e9 * ms, timings)


def row(mask="random", density=0.1, ms=2.0, block=(64, 64), arch="sm90", **peers):
    case = Case(
        arch=arch, rows_q=32768, rows_kv=32768, mask=mask, density=density, block=tuple(block)
    )
    return row_of_case(case, ms, **peers)


@pytest.fixture
def sample() -> dict:
    return {
        "gpu": "NVIDIA H200",
        "family": "sm90",
        "driver": "580.1",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "date": "2026-01-02",
        "source": "ab" * 32,
        "tests": {"passed": 3, "failed": 0, "skipped": 1},
        "rows": [
            row("dense", 1.0, 20.0, sdpa_flash=24.0),
            row("random", 0.5, 10.0, flex=15.0, fa4=9.0),
            row("random", 0.1, 2.0, flex=5.0),
            row("random", 0.1, 4.0, arch="sm80"),
            row("random", 0.1, 1.0, (128, 128), flex=5.0),
        ],
    }


def test_record_round_trip_and_place(sample, tmp_path):
    path = tmp_path / record.record_path("NVIDIA H200").name
    assert path.name == "nvidia_h200.json"
    record.write_record(sample, path)
    assert json.loads(path.read_text()) == sample
    one_per_line = [line for line in path.read_text().splitlines() if line.startswith('  {"op"')]
    assert len(one_per_line) == len(sample["rows"])


@pytest.fixture
def complete(sample) -> dict:
    rows = [row_of_case(case, 2.0) for case in all_cases("sm90")]
    return sample | {"rows": rows, "sanitizer": {"memcheck": 0}, "failures": {}, "launch": {}}


def judged(tmp_path: Path, *records: dict, source: str = "ab" * 32) -> tuple[bool, str]:
    paths = [tmp_path / f"gpu{i}.json" for i in range(len(records))]
    for path, one in zip(paths, records, strict=True):
        record.write_record(one, path)
    return record.check_records(paths, source)


def test_row_names_its_case():
    for case in all_cases("sm90"):
        assert case_of(row_of_case(case, 2.0)) == case


def test_check_answers_whether_the_record_is_current(complete, tmp_path):
    assert judged(tmp_path)[0] is False
    sound, text = judged(tmp_path, complete)
    assert sound and "3 passed, 0 failed, 1 skipped; sanitizer: memcheck." in text
    assert "\n" not in text
    sound, text = judged(tmp_path, complete, source="cd" * 32)
    assert not sound and "make gpu-check" in text and "\n" not in text


def test_check_names_what_is_wrong_with_a_present_record(complete, tmp_path):
    dense = all_cases("sm90")[0].name
    changes = {
        "2 GPU tests failed (pytest exit status 3)": {
            "tests": {"passed": 1, "failed": 2, "skipped": 0, "note": "pytest exit status 3"}
        },
        "racecheck: found 4": {"sanitizer": {"memcheck": 0, "racecheck": 4}},
        "memcheck: stopped after 9 s": {"sanitizer": {"memcheck": "stopped after 9 s"}},
        f"{dense}: not measured": {"rows": complete["rows"][1:]},
        f"{dense}: out of luck": {"rows": complete["rows"][1:], "failures": {dense: "out of luck"}},
    }
    for wanted, change in changes.items():
        sound, text = judged(tmp_path, complete | change)
        assert not sound and text.splitlines()[1:] == [f"  {wanted}"]
    without = {key: value for key, value in complete.items() if key != "launch"}
    assert "  launch: not measured" in judged(tmp_path, without)[1]
    sound, text = judged(tmp_path, complete | {"sanitizer": None})
    assert sound and "sanitizer: not run" in text
    # One sound record does not excuse another; records of other sources do not matter.
    assert not judged(tmp_path, complete, complete | {"tests": {"failed": 1}})[0]
    old = complete | {"source": "cd" * 32, "tests": {"failed": 1}}
    assert judged(tmp_path, complete, old)[0]


def test_partial_record_is_named_and_left_out_of_figures(complete, tmp_path, monkeypatch, capsys):
    partial = {key: value for key, value in complete.items() if key != "tests"}
    sound, text = judged(tmp_path, partial)
    assert not sound and "tests: not run" in text and "partial" in text
    assert figures.newest_record(tmp_path) is None
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "source_hash", lambda: "ab" * 32)
    assert record.main(["--check"]) == 1 and "partial" in capsys.readouterr().out
    judged(tmp_path, complete | {"date": "2025-01-01"})
    assert record.main(["--check"]) == 0
    record.write_record(partial, tmp_path / "newer.json")
    assert figures.newest_record(tmp_path)["date"] == "2025-01-01"


def test_check_tells_the_newest_of_other_records(complete, tmp_path):
    """By date, not by name."""
    newer, older = complete | {"date": "2026-05-01"}, complete | {"date": "2025-05-01"}
    _, text = judged(tmp_path, newer, older, source="cd" * 32)
    assert "gpu0.json" in text and "2026-05-01" in text and "gpu1.json" not in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--only", "nosuchcase*"], "--only: expected a pattern of some case's name, got 'nosuch"),
        (["--peers", "fa3,nosuchpeer"], "--peers: expected some of sdpa_flash, "),
    ],
)
def test_options_that_choose_nothing_are_refused(options, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: {"gpu": "none", "family": "sm80"})
    with pytest.raises(SystemExit) as stop:
        record.main(options)
    assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_help_keeps_the_lines_of_the_commands(capsys):
    for module in (record, figures):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert sum(line.startswith(f"python -m {module.__name__} ") for line in lines) >= 2


@pytest.mark.parametrize(
    ("tests", "sanitizer", "missing", "wanted"),
    [
        ({"failed": 0}, {"memcheck": 0}, [], True),
        ({"failed": 1}, {"memcheck": 0}, [], False),
        ({"failed": 0}, {"memcheck": 2}, [], False),
        ({"failed": 0}, {"memcheck": "stopped after 40 s"}, [], False),
        ({"failed": 0}, None, [], True),
        ({"failed": 0}, None, ["sm80-8k"], False),
    ],
)
def test_exit_status(tests, sanitizer, missing, wanted):
    assert record.succeeded({"tests": tests, "sanitizer": sanitizer}, missing) is wanted


def test_a_run_writes_what_it_measured_and_why_the_rest_is_missing(tmp_path, monkeypatch, capsys):
    class Clock:
        idle = sm_mhz = lambda self, *_: None

        def time_launches(self, launch, warm, timed):
            return [2.0] * timed

        def host_ms(self, launch, count):
            return 0.1

    def no_graphs():
        raise RuntimeError("no graphs here")

    small = Case(heads_q=2, heads_kv=1, rows_q=128, rows_kv=128)
    about = {"gpu": "none", "driver": None, "torch": "2", "family": "sm80"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda: dict(about))
    monkeypatch.setattr(record, "all_cases", lambda family: [small, Case(mask="unknown")])
    monkeypatch.setattr(timing, "CudaClock", Clock)
    monkeypatch.setattr(launch, "launch_costs", no_graphs)
    on_cpu = functools.partial(runner.run_cases, device="cpu")
    monkeypatch.setattr(runner, "run_cases", on_cpu)
    path = tmp_path / "record.json"
    assert record.main(["--no-tests", "--peers", "", "--output", str(path)]) == 1
    written = json.loads(path.read_text())
    assert [row["ms"] for row in written["rows"]] == [2.0] and "tests" not in written
    assert written["failures"]["launch"] == "RuntimeError: no graphs here"
    assert set(written["failures"]) == {"launch", Case(mask="unknown").name}
    assert f"{small.name} " in capsys.readouterr().out


def test_counts_of_junit_and_sanitizer_logs(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>'
    )
    assert count_tests(junit) == {"passed": 4, "failed": 3, "skipped": 3}
    assert sanitizer_errors("memcheck", "========= ERROR SUMMARY: 0 errors") == 0
    assert sanitizer_errors("memcheck", "= ERROR SUMMARY: 1 error\n= ERROR SUMMARY: 2 errors") == 3
    race = "========= RACECHECK SUMMARY: 4 hazards displayed (1 error, 3 warnings)"
    assert sanitizer_errors("racecheck", race) == 4
    assert sanitizer_errors("synccheck", "killed") is None


# ------------------------------------------------------------------------------ tables and figures


def test_ratios(sample):
    rows = sample["rows"]
    assert report.dense_speedup(rows[2], rows) == pytest.approx(12.0)
    assert report.dense_speedup(rows[3], rows) == pytest.approx(6.0)
    assert report.dense_speedup(rows[2] | {"head_dim": 64}, rows) is None
    assert report.best_peer(rows[1]) == ("fa4", 9.0)
    assert report.peer_tflops(rows[2], "flex") == pytest.approx(160.0)
    line = report.row_line(rows[1])
    assert line.startswith("sm90-32k-64x64-random-d0.5 ") and "  400.0   0.90x" in line
    assert line.endswith("  fa4 444  flex 267")
    assert report.row_line(rows[3]).endswith("-")


def test_tables_show_families_and_peers_beside_each_other(sample):
    table = report.sparse_table(sample["rows"], 32768, [(64, 64), (128, 128)])
    ours = "seer_cuda (Hopper) | seer_cuda (portable) | FlashAttention-4 | FlexAttention"
    assert table[0].startswith(f"| blocks | kept | {ours} | against the best peer |")
    assert table[2:] == [
        "| 64x64 | 50% | 400 | - | 444 | 267 | 0.90x | 2.4x |",
        "| 64x64 | 10% | 400 | 400 | - | 160 | 2.50x | 12.0x |",
        "| 128x128 | 10% | 400 | - | - | 80 | 5.00x | 24.0x |",
    ]
    assert report.dense_table(sample["rows"])[2:] == ["| 32k, causal | 400 | 333 | 1.20x |"]


def test_heads_of_64_have_a_table_of_their_own(sample):
    assert report.small_head_table(sample["rows"], 32768) == []
    shape = {"arch": "sm90", "rows_q": 32768, "rows_kv": 32768, "head_dim": 64}
    rows = [*sample["rows"], row_of_case(Case(mask="dense", **shape), 2.0, fa3=4.0)]
    rows += [row_of_case(Case(density=density, **shape), 1.0) for density in (0.1, 1.0)]
    table = report.small_head_table(rows, 32768)
    assert table[0] == (
        "| head_dim 64 | kept | seer_cuda (Hopper) | FlashAttention-3 | against the best peer |"
    )
    assert table[2:] == [
        "| no mask | 100% | 400 | 200 | 2.00x |",
        "| 64x64 | 100% | 400 | - | - |",
        "| 64x64 | 10% | 400 | - | - |",
    ]


def test_tables_leave_out_what_is_not_the_headline(sample):
    other = Case(arch="sm90", rows_q=32768, rows_kv=32768, density=0.1)
    changes = {"head_dim": 64, "dtype": "float16", "mask": "structured", "rows_kv": 8192}
    table = report.sparse_table(sample["rows"], 32768, [(64, 64)])
    for field, value in changes.items():
        row = row_of_case(dataclasses.replace(other, **{field: value}), 1.0)
        assert report.sparse_table([row, *sample["rows"]], 32768, [(64, 64)]) == table


def test_host_bound_times_are_marked(sample):
    slow = sample["rows"][2]
    assert "host-bound" not in report.row_line(slow)
    slow["peers_host"]["flex"] = 4.75  # of 5 ms
    assert report.host_bound(slow) == ["flex"]
    assert "host-bound: flex" in report.row_line(slow)
    assert r"| 64x64 | 10% | 400 | 400 | - | 160\* | 2.50x\* |" in figures.speed_section(sample)
    assert r"\* host-bound" in figures.speed_section(sample)
    slow["host_ms"] = slow["ms"]
    assert report.host_bound(slow) == ["flex", "seer_cuda"]
    assert r"| 10% | 400\* | 400 |" in figures.speed_section(sample)


def test_readme_names_the_peers_that_were_not_there(sample):
    assert "not compared" not in figures.speed_section(sample | {"unavailable": {}})
    told = figures.speed_section(sample | {"unavailable": {"fa3": "not installed", "fa4": "no"}})
    assert "not compared: FlashAttention-3, FlashAttention-4." in told


def test_launch_costs_are_told():
    cost = {"call_us": 20.0, "kernel_us": 8.0, "overhead_us": 12.0, "host_us": 7, "stream_us": 9.0}
    (line,) = report.launch_lines({"tiny": cost})
    assert "tiny" in line and "20.0 from the call to completion = kernel 8.0 + 12.0" in line


def test_series_give_dense_peers_their_dense_rate(sample):
    lines = figures.series(sample["rows"], (64, 64))
    assert lines["sm90"] == [(0.5, 400.0), (0.1, 400.0)] and lines["sm80"] == [(0.1, 400.0)]
    assert list(lines)[:2] == ["sm90", "sm80"]
    assert lines["sdpa_flash"] == [(0.5, pytest.approx(1000 / 3)), (0.1, pytest.approx(1000 / 3))]
    assert lines["fa4"] == [(0.5, pytest.approx(400 / 0.9))]


def test_labels_keep_their_distance_and_their_place():
    heights = figures._label_heights({"a": 10.0, "b": 11.0, "c": 50.0}, gap=5.0)
    assert heights == {"a": 8.0, "b": 13.0, "c": 50.0}
    heights = figures._label_heights({name: 20.0 for name in "abc"}, gap=5.0)
    assert sorted(heights.values()) == [15.0, 20.0, 25.0]


VARIANTS = [
    {"op": "block_sparse_attn", "sm": 80, "dtype": dtype, "head_dim": 128, "block_q": block}
    | {"tile_kv": 64}
    for dtype in ("bfloat16", "float16")
    for block in (64, 128)
]


def test_generated_readme_is_stable_and_complete(sample):
    bare = "# x\n" + "\n".join(
        f"<!-- generated: {name} -->\n<!-- end: {name} -->"
        for name in ("figure", "speed", "support")
    )
    text = figures.generated_readme(bare, sample, VARIANTS)
    assert figures.generated_readme(text, sample, VARIANTS) == text
    assert "| 64x64 | 10% | 400 | 400 |" in text
    compiled = "compute capability 8.0 and newer | bfloat16, float16 | 128 | 64, 128 | 64, 128"
    assert compiled in text
    assert "| `attn_pool` | torch operations, no kernel yet" in text
    assert figures.generated_readme(text, None, VARIANTS) != text
    with pytest.raises(ValueError, match="expected the markers"):
        figures.with_section("# x", "speed", "")


def test_stale_names_what_is_out_of_date(sample, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(
        "".join(
            f"<!-- generated: {n} -->\n<!-- end: {n} -->\n" for n in ("figure", "speed", "support")
        )
    )
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "README", readme)
    monkeypatch.setattr(figures, "IMAGES", tmp_path / "docs" / "img")
    assert len(figures.stale(sample, VARIANTS)) == 1 + 2 * 2
    for name in figures.FIGURES:
        for theme in figures.THEMES:
            figures.draw(name, sample, theme, figures.figure_path(name, theme))
    readme.write_text(figures.generated_readme(readme.read_text(), sample, VARIANTS))
    assert figures.stale(sample, VARIANTS) == []
    sample["rows"][1]["ms"] = 11.0
    assert len(figures.stale(sample, VARIANTS)) == 1 + 2 * 2


def test_the_overview_shows_what_the_rows_say(sample):
    base = sample["rows"][0] | {"peers": {}}
    pool = {"op": "attn_pool", "pools": "per_token", "ms": 6.0, "dense_ms": 5.0}
    gate = {"op": "gate_mask", "mask": "threshold", "ms": 0.5, "gbps": 300.0, "copy_gbps": 400.0}
    rows = [base | pool, base | pool | {"block": [128, 128], "head_dim": 64, "ms": 5.5}]
    rows += [base | gate | {"peers": {"gate_compile": 2.0}}]
    length = report.length(base["rows_kv"])
    names, costs = zip(*overview.map_costs(rows), strict=True)
    assert names == (f"{length}, per token", f"{length}, per token, 128x128, head_dim 64")
    assert costs == pytest.approx((0.2, 0.1))
    assert overview.shares({"gpu": "Other GPU", "rows": rows}) == [(f"gate_mask, {length}", 0.75)]
    times = overview.gate_times(rows)
    assert times["ours"] == [(base["rows_kv"], 0.5)]
    assert times["gate_compile"] == [(base["rows_kv"], 2.0)]
    for points in overview.by_length(sample["rows"]).values():
        assert points == sorted(points, reverse=True)
