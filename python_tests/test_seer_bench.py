# SPDX-License-Identifier: Apache-2.0
"""seer_bench (bench/cpp): its command line, the work it counts, and on a GPU its own check.

SEER_BENCH=<path>  the program; otherwise where a build of this checkout puts it
"""

import csv
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bench import masks
from bench.cases import Case
from bench.gate import GateProblem
from seer_cuda import __version__
from tools.build_dir import build_dir

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = ["block_sparse_attn", "attn_pool"]
OPS = [*ATTENTION, "pool_gate", "pool_gate_pair", "gate_scores", "gate_select"]


def _program():
    named = os.environ.get("SEER_BENCH")
    places = [Path(named)] if named else [ROOT / build_dir(), ROOT / "build"]
    places = [place / "seer_bench" if place.is_dir() else place for place in places]
    return next((place for place in places if place.is_file()), None)


@pytest.fixture(scope="module")
def seer_bench():
    """Runs the program: (exit status, standard output, standard error)."""
    program = _program()
    if program is None:
        pytest.skip("seer_bench is not built: cmake -B build && cmake --build build")

    def run(*arguments, **environment):
        done = subprocess.run(
            [program, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def _plan(seer_bench, *arguments):
    code, out, error = seer_bench(*arguments, "--plan", "--format", "json")
    assert code == 0, error
    return json.loads(out)["rows"]


def test_help_names_every_option_and_operator(seer_bench):
    code, out, error = seer_bench("--help")
    assert code == 0 and error == ""
    for word in [*OPS, "--rows", "--density", "--verify", "--list", "--l2", "--protocol"]:
        assert word in out
    assert max(map(len, out.splitlines())) <= 120
    assert seer_bench("--version") == (0, f"seer_bench {__version__}\n", "")


def test_list_is_the_table_of_variants(seer_bench):
    code, out, _ = seer_bench("--list", "--format", "json")
    rows = json.loads(out)["rows"]
    known = json.loads((ROOT / "csrc" / "variants.json").read_text())["kernels"]
    known = {row["name"]: row for row in known}
    assert code == 0 and rows
    for row in rows:
        row["name"], row["sm"] = row.pop("kernel"), int(row.pop("family").removeprefix("sm"))
        of_table = known[row["name"]]
        assert {key: value for key, value in row.items() if value is not None} == of_table
    portable = {name for name, row in known.items() if row["sm"] == 80}
    assert portable <= {row["name"] for row in rows}
    assert seer_bench("--list")[1].splitlines()[0].startswith("kernel ")
    assert len(seer_bench("--list", "--format", "csv")[1].splitlines()) == len(rows) + 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "op: expected block_sparse_attn, attn_pool, "),
        ("block_sparse_atn", "got 'block_sparse_atn'. Did you mean block_sparse_attn?"),
        ("attn_pool attn_pool", "op: expected one operator, got 'attn_pool'. It comes after"),
        ("attn_pool --densty 1", "--densty: no such option. Did you mean --density? "),
        ("attn_pool --density 1", "--density: expected with block_sparse_attn only, got it with"),
        ("attn_pool --rows", "--rows: expected a value, got nothing. "),
        ("attn_pool --rows 12a", "--rows: expected integers from 1 to 1073741824, got '12a'. "),
        ("attn_pool --rows 1,,2", "--rows: expected integers from 1 to 1073741824, got nothing. "),
        ("attn_pool --rows 0", "--rows: expected integers from 1 to 1073741824, got '0'. "),
        ("attn_pool --rows 9999999999k", "--rows: expected integers from 1 to"),
        ("attn_pool --verify=1", "--verify: expected no value, got '1'. Leave it out."),
        ("attn_pool --causal yes", "--causal: expected 0 or 1, got 'yes'. Use 0,1 for both."),
        ("attn_pool --arch sm75", "--arch: expected auto, sm80 or sm90, got 'sm75'. "),
        ("attn_pool --dtype fp8", "--dtype: expected bfloat16, float16, bf16 or fp16, got 'fp8'."),
        ("attn_pool --block 64x", "--block: expected sizes such as 64, 128 or 64x128 "),
        ("attn_pool --heads-q 32 --heads-kv 7", "--heads-kv: expected a divisor of the query"),
        ("attn_pool --l2 warm", "--l2: expected hot or cold, got 'warm'. "),
        ("block_sparse_attn --density 1.5", "--density: expected numbers from 0 to 1, got '1.5'."),
        ("block_sparse_attn --density nan", "--density: expected numbers from 0 to 1, got 'nan'."),
        ("block_sparse_attn --mask band", "--mask: expected dense, random, kv_head or structured"),
        ("pool_gate --pools avgmax", "--pools: expected max, min, avg or several in that order"),
        ("pool_gate --block 64x128", "--block: expected one size for both sides with pool_gate"),
        ("gate_select --method best", "--method: expected threshold, topk, density or topp"),
        ("gate_select --method density --value 2", "--value: expected a density from 0 to 1 with"),
    ],
)
def test_wrong_options_are_named(seer_bench, arguments, text):
    code, out, error = seer_bench(*arguments.split())
    assert (code, out) == (2, "")
    assert error.startswith("seer_bench: ") and text in error and error.count("\n") == 1


def test_without_a_gpu_it_says_so(seer_bench):
    code, out, error = seer_bench("gate_select", CUDA_VISIBLE_DEVICES="")
    assert (code, out) == (2, "")
    assert error.startswith("seer_bench: no CUDA device: ") and error.count("\n") == 1
    assert error.endswith("Timing needs a GPU; --plan, --list and --help do not.\n")


def test_lists_are_swept(seer_bench):
    options = "--rows 1k,2k --density 1,0.5,0.25 --mask dense,random --dtype=bf16,fp16"
    rows = _plan(seer_bench, "block_sparse_attn", *options.split())
    # A case without a mask appears once, whatever the densities.
    assert len(rows) == 2 * 2 * (1 + 3)
    assert {row["rows_q"] for row in rows} == {row["rows_kv"] for row in rows} == {1024, 2048}
    assert {row["density"] for row in rows if row["mask"] == "dense"} == {1}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16"}
    options = "--method threshold,topk,density,topp"
    rows = _plan(seer_bench, "gate_select", *options.split())
    assert [row["value"] for row in rows] == [0.002, 64, 0.1, 0.9]
    code, out, _ = seer_bench("attn_pool", "--reduce", "max,sum", "--plan", "--format", "csv")
    assert code == 0
    assert [row["reduce"] for row in csv.DictReader(io.StringIO(out))] == ["max", "sum"]


def test_work_of_the_longest_sequence(seer_bench):
    """2^30 rows: counted by row of blocks, not by block."""
    (row,) = _plan(seer_bench, "attn_pool", "--rows", "1048576k")
    blocks = 2**30 // 64
    assert row["gflop"] == pytest.approx(4 * 128 * 64**2 * 32 * blocks**2 / 2 / 1e9, rel=1e-6)


def test_a_mask_that_no_memory_holds_fails_and_the_rest_is_told(seer_bench):
    options = "block_sparse_attn --rows 1048576k,1k --density 0.1 --plan --format json"
    code, out, error = seer_bench(*options.split())
    assert code == 1 and [row["rows_q"] for row in json.loads(out)["rows"]] == [1024]
    assert "1073741824" in error and "host memory: expected room for the mask" in error
    assert error.endswith("1 of 2 cases failed\n")


@pytest.mark.parametrize("mask", ["dense", "random", "kv_head", "structured"])
@pytest.mark.parametrize("block", [(64, 64), (128, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [(1000, 1000), (700, 2048), (2048, 700)])
def test_work_is_that_of_the_python_benchmarks(seer_bench, mask, block, causal, rows):
    options = f"--rows {rows[0]} --rows-kv {rows[1]} --heads-q 4 --heads-kv 2 --causal {causal:d} "
    options += f"--block {block[0]}x{block[1]} --mask {mask} --density 0.3 --batch 2 --head-dim 64"
    (row,) = _plan(seer_bench, "block_sparse_attn", *options.split())
    case = Case(
        batch=2,
        heads_q=4,
        heads_kv=2,
        head_dim=64,
        rows_q=rows[0],
        rows_kv=rows[1],
        causal=causal,
        block=block,
        density=0.3,
        mask=mask,
    )
    expected = None if mask == "dense" else masks.block_mask(case)
    flops = masks.flops(case, expected)
    # Where the diagonal crosses several blocks of a row, chance decides how many of them are kept.
    one_crossed = block[0] <= block[1] and (rows[0] - rows[1]) % block[1] == 0
    exact = mask in ("dense", "structured") or not causal or one_crossed
    assert row["gflop"] == pytest.approx(flops / 1e9, rel=1e-5 if exact else 0.1)
    if expected is not None:
        share = float(expected.sum()) / (float(masks.visible_blocks(case).sum()) * 2)
        assert row["kept"] == pytest.approx(share / expected.shape[1], abs=1e-3)


@pytest.mark.parametrize("pools", ["avg", "maxminavg"])
def test_bytes_are_those_of_the_python_benchmarks(seer_bench, pools):
    case = Case(op="pool_gate", rows_q=1000, rows_kv=1000, mask="none", pools=pools)
    expected = GateProblem.build(case, "cpu").work
    side = "q" if pools == "avg" else "k"
    (row,) = _plan(seer_bench, "pool_gate", "--rows", 1000, "--side", side)
    assert row["pools"] == pools
    assert row["mbytes"] * 1e6 == pytest.approx(expected, abs=1e3)


QUICK = ["--rounds=1", "--warm-ms=0", "--pause-ms=0", "--launches=2", "--no-ceilings"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        "block_sparse_attn --rows 1000 --mask dense,random,kv_head,structured --block 64,128 "
        "--density 0.3 --causal 0,1 --head-dim 64,128 --dtype bf16,fp16",
        "block_sparse_attn --rows 300 --rows-kv 1000 --arch sm80 --block 64x128,128x64",
        "attn_pool --rows 700 --reduce max,sum --per-token 0,1 --block 64,128 --causal 0,1",
        "pool_gate --rows 1000 --side q,k --pools max,avg,maxminavg --head-dim 64,128",
        "pool_gate_pair --rows 1000,4096 --dtype bf16,fp16",
        "gate_scores --rows 300,8192 --rows-kv 300,8192 --causal 0,1",
        "gate_select --rows 8192 --method threshold,topk,density,topp --causal 0,1",
    ],
    ids=lambda options: options.split()[0],
)
def test_verify(seer_bench, options):
    heads = ["--heads-q", 8] + (["--heads-kv", 2] if options.split()[0] not in OPS[4:] else [])
    code, out, error = seer_bench(*options.split(), *heads, *QUICK, "--verify", "--format", "json")
    assert (code, error) == (0, "")
    rows = json.loads(out)["rows"]
    assert rows
    for row in rows:
        assert " of " in row["verify"] and "WRONG" not in row["verify"]
        assert 0 < row["p5"] <= row["ms"] <= row["p95"]


@pytest.mark.gpu
def test_report_of_a_run(seer_bench):
    sweep = ["--l2", "hot,cold", "--protocol", "sustained,burst", "--rounds", 1, "--warm-ms", 1]
    code, out, error = seer_bench("gate_select", "--rows", 4096, *sweep, "--format", "json")
    assert (code, error) == (0, "")
    report = json.loads(out)
    assert report["machine"]["gpu"] == torch.cuda.get_device_name(0)
    assert report["machine"]["ceiling_tflops"] > 1 and report["machine"]["ceiling_gbps"] > 1
    told = [(row["protocol"], row["l2"]) for row in report["rows"]]
    assert told == [(p, l2) for p in ("sustained", "burst") for l2 in ("hot", "cold")]
    assert all(0 < row["%gbps"] < 120 for row in report["rows"])


@pytest.mark.gpu
def test_a_failed_allocation_does_not_fail_the_next_case(seer_bench):
    sweep = ["--mask", "dense", "--rows", "1048576k,512"]
    code, out, error = seer_bench("block_sparse_attn", *sweep, *QUICK, "--format", "json")
    assert code == 1 and "cudaErrorMemoryAllocation" in error and "1 of 2 cases failed" in error
    assert [row["rows_q"] for row in json.loads(out)["rows"]] == [512]


@pytest.mark.gpu
def test_what_no_kernel_serves_fails_and_the_rest_runs(seer_bench):
    for op in OPS:
        code, out, error = seer_bench(op, "--head-dim", "48,64", "--rows", 512, *QUICK)
        assert code == 1 and "64" in out
    assert "expected" in error and "1 of 2 cases failed" in error
