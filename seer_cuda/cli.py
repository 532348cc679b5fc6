# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m seer_cuda info`` and ``python -m seer_cuda demo``.

Exit codes: 0 done, 1 a run that could not finish (a full disk), 2 options or text that cannot be
used, 3 an optional package is missing, 130 interrupted. User errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from seer_cuda import info
from seer_cuda._version import __version__

OK, FAILED, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    top = argparse.ArgumentParser(
        prog="seer-cuda", description="Block-sparse attention with a learned gate."
    )
    top.add_argument("--version", action="version", version=f"seer_cuda {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{info,demo}")

    about = commands.add_parser("info", help="what this build holds and what runs on this machine")
    about.add_argument("--json", action="store_true", help="print JSON")

    demo = commands.add_parser(
        "demo",
        help="train a small model and its gates on real text, and measure sparse attention",
        description="Trains a small language model on real text, distils a gate for each of its "
        "layers, and compares held-out perplexity, kept attention and speed with other ways to "
        "choose blocks. Minutes on a laptop's CPU; larger on a GPU.",
    )
    demo.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help="a text file or a folder of them (default: the source of Python's standard library)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("seer_demo"),
        metavar="DIR",
        help="where figure.png and results.json go (default: ./seer_demo)",
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument(
        "--size", choices=("auto", "small", "large"), default="auto", help="auto: large on a GPU"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, metavar="N", help="training steps of the model")
    demo.add_argument("--distil-steps", type=int, metavar="N", help="training steps of the gates")
    demo.add_argument("--windows", type=int, metavar="N", help="held-out windows to evaluate")
    demo.add_argument("--context", type=int, metavar="N", help="tokens of a window")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "info":
            print(info.as_json(info.collect()) if options.json else info.as_text(info.collect()))
            return OK
        return _demo(options)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone (``| head``): nothing is left to say, not even at exit.
        sys.stdout = None
        return FAILED


def _fail(message: str, code: int) -> int:
    print(f"seer-cuda: {message}", file=sys.stderr)
    return code


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(
            f"the demo needs {' and '.join(missing)}: pip install 'seer_cuda[demo]'", MISSING
        )
    # Imported here, so that every other command works without the extra.
    from seer_cuda.demo import run
    from seer_cuda.demo.config import ConfigError
    from seer_cuda.demo.device import DeviceError, choose
    from seer_cuda.demo.text import TextError

    try:
        device = choose(options.device)
        size = options.size
        if size == "auto":
            size = "large" if device == "cuda" else "small"
        config = run.make_config(
            size,
            device,
            seed=options.seed,
            steps=options.steps,
            distil_steps=options.distil_steps,
            windows=options.windows,
            context=options.context,
        )
        run.run(config, options.text, options.out)
    except (ConfigError, DeviceError, TextError) as error:
        return _fail(str(error), USAGE)
    except OSError as error:
        return _fail(f"--out {options.out}: {error}", FAILED)
    return OK
