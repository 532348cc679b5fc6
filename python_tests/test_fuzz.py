# SPDX-License-Identifier: Apache-2.0
"""tools/fuzz.py: a wrong op is found, its line repeats it, a crash and a hang are failures."""

import json
import random
import shlex
import sys
from pathlib import Path

import attention
import drawn_cases
import pytest
import torch

# A child process that imports it finds it there too.
sys.path.append(str(Path(__file__).parents[1] / "tools"))
import fuzz


class Here:
    """The Worker's place, in this process, where a test can break an op; ends after `cases`."""

    def __init__(self, cases):
        self.left = cases

    def __call__(self, case):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return fuzz.judge(case)

    def stop(self):
        pass


def options(tmp_path, **changes):
    values = {"device": "cpu", "seed": 3, "first": 0, "op": None, "minutes": 5.0}
    return fuzz.argparse.Namespace(**(values | {"log": tmp_path / "log.jsonl"} | changes))


def events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def forget_a_block(q, k, v, block_bits=None, **kw):
    """block_sparse_attn that drops the mask's first block where there is a mask."""
    kw.pop("arch")
    bits = None if block_bits is None else block_bits & ~1
    return torch.ops.seer.block_sparse_attn(q, k, v, bits, **kw)


def test_a_wrong_op_is_found_and_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "sparse_op", forget_a_block)
    assert fuzz.run(options(tmp_path, op="block_sparse_attn"), Here(20)) == 1
    begin, *middle, summary = events(tmp_path)
    failures = [event for event in middle if event["event"] == "failure"]
    assert (begin["event"], summary["event"]) == ("start", "summary")
    assert len(failures) == summary["failed"] >= 3 and summary["cases"] == 20
    assert summary["ops"] == {"block_sparse_attn": 20}
    again = failures[0]["again"]
    assert again in capsys.readouterr().out
    arguments = shlex.split(again)[2:]
    assert fuzz.main(arguments) == 1
    text = capsys.readouterr().out
    assert json.dumps(failures[0]["case"]) in text and failures[0]["found"] in text
    monkeypatch.undo()
    assert fuzz.main(arguments) == 0


def test_right_ops_pass(tmp_path):
    assert fuzz.run(options(tmp_path), Here(15)) == 0
    assert events(tmp_path)[-1]["cases"] == 15


def test_a_case_depends_on_its_seed_and_number_alone():
    cases = [fuzz.draw(11, number, "cpu") for number in range(60)]
    random.seed(0)
    assert [fuzz.draw(11, number, "cpu") for number in reversed(range(60))] == cases[::-1]
    assert fuzz.draw(12, 0, "cpu") != cases[0]
    assert {case["op"] for case in cases} == set(drawn_cases.OPS)
    assert json.loads(json.dumps(cases)) == cases


def test_a_crash_and_a_hang_are_failures():
    """And the next case finds a new process."""
    worker = fuzz.Worker(eval)
    try:
        assert worker("'one'") == "one"
        assert "-6 (a negative one is a signal)" in worker("__import__('os').abort()")
        assert worker("'two'") == "two"
        worker.patience = 1.0
        assert "still running after 1 s" in worker("__import__('time').sleep(60)")
        worker.patience = 60.0
        assert worker("'three'") == "three"
    finally:
        worker.stop()


@pytest.mark.parametrize(
    "wrong", [["--case", "3", "--device", "cpu"], ["--op", "softmax"], ["--device", "tpu"]]
)
def test_wrong_options(wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        fuzz.main(wrong)
    assert raised.value.code == 2 and "expected" in capsys.readouterr().err.replace(
        "choose", "expected"
    )
