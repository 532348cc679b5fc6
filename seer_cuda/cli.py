# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m seer_cuda info``, ``demo``, ``distill`` and ``eval``.

Exit codes: 0 done, 1 a run that could not finish (a full disk), 2 options or text that cannot be
used, 3 an optional package is missing, 130 interrupted. User errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from seer_cuda import info
from seer_cuda._version import __version__
from seer_cuda.select import METHODS, Rule

OK, FAILED, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 130


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    top = argparse.ArgumentParser(
        prog="seer-cuda", description="Block-sparse attention with a learned gate."
    )
    top.add_argument("--version", action="version", version=f"seer_cuda {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{info,demo,distill,eval}")

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
    _add_distill(commands)
    _add_eval(commands)
    return top


def _add_distill(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "distill",
        help="train gates for a local Hugging Face model",
        description="Trains a gate for each layer of a local transformers model on local text and "
        "saves them in the released format; with --train-all the model too. Started again, a run "
        "that was killed goes on. Under torchrun, processes share the batches of a step.",
    )
    command.add_argument("--model", required=True, metavar="DIR", help="the model's folder")
    command.add_argument("--text", required=True, metavar="PATH", help="a text file or a folder")
    command.add_argument("--out", required=True, metavar="DIR", help="gates, checkpoint, log.csv")
    command.add_argument("--context", type=int, default=8192, metavar="N", help="tokens a window")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="windows at a time")
    command.add_argument("--accumulate", type=int, default=16, metavar="N", help="batches a step")
    command.add_argument("--steps", type=int, default=500, metavar="N")
    command.add_argument("--lr", type=float, default=1e-3, help="of the gates")
    command.add_argument("--warm-up", type=int, default=20, metavar="N", help="steps")
    command.add_argument("--save-every", type=int, default=25, metavar="N", help="steps")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument(
        "--cache",
        type=int,
        default=0,
        metavar="N",
        help="the model computes N windows once, and steps draw from them (default: 0, new ones "
        "each step)",
    )
    command.add_argument("--gates", metavar="DIR", help="gates to begin with (default: new ones)")
    # Left out, they have the defaults of `Distill`.
    form = {"default": argparse.SUPPRESS}
    command.add_argument("--gate", **form, help="pooling of new gates (default: Qavg_Kmaxminavg)")
    command.add_argument("--gate-dim", type=int, **form, metavar="N", help="default: head_dim")
    command.add_argument("--tensorboard", metavar="DIR", help="events for TensorBoard")
    joint = command.add_argument_group("training the model too")
    joint.add_argument(
        "--train-all",
        action="store_true",
        help="loss: next token plus gates; the model is saved as model/ in --out",
    )
    # Left out, they have the defaults of `Distill`, which refuses them without --train-all.
    own = {"type": float, "default": argparse.SUPPRESS}
    joint.add_argument("--model-lr", **own, help="of the model's weights (default: 1e-5)")
    joint.add_argument("--gate-scale", **own, help="factor on the gates' loss (default: 10)")
    joint.add_argument(
        "--checkpointing", action="store_true", help="less memory, layers computed twice"
    )


def _add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "eval",
        help="held-out perplexity of a local Hugging Face model, dense and sparse",
        description="Perplexity on the end of a text that distill does not train on. With --out "
        "a study: the gates, the oracle and choices without training at equal densities.",
    )
    command.add_argument("--model", required=True, metavar="DIR", help="the model's folder")
    command.add_argument("--gates", required=True, metavar="DIR", help="the gates' folder")
    command.add_argument("--text", required=True, metavar="PATH", help="a text file or a folder")
    command.add_argument("--method", choices=tuple(METHODS), help="default: the gates' rule")
    command.add_argument("--value", type=float, help="of --method")
    command.add_argument("--context", type=int, default=8192, metavar="N", help="tokens a window")
    command.add_argument("--windows", type=int, default=8, metavar="N")
    command.add_argument("--out", metavar="DIR", help="study: results.json and figures go there")
    command.add_argument(
        "--densities", type=float, nargs="+", metavar="D", help="of the study, 0.5 to 0.05"
    )
    command.add_argument(
        "--thresholds", type=float, nargs="*", metavar="T", help="of the study, gates only"
    )
    command.add_argument(
        "--calibration",
        type=int,
        metavar="N",
        help="of the study: windows outside the held-out part, on which every method's threshold "
        "and top-p of equal mean densities are found; 0: without them (default: 2)",
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "info":
            print(info.as_json(info.collect()) if options.json else info.as_text(info.collect()))
            return OK
        return {"demo": _demo, "distill": _distill, "eval": _eval}[options.command](options)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone (``| head``): nothing is left to say, not even at exit.
        sys.stdout = None
        return FAILED


def _fail(message: str, code: int) -> int:
    print(f"seer-cuda: {message}", file=sys.stderr)
    return code


def _fail_os(error: OSError, out: str | Path | None) -> int:
    """Names --out where the file that could not be used is there."""
    if out is not None and isinstance(error.filename, (str, os.PathLike)):
        place, folder = Path(error.filename).resolve(), Path(out).resolve()
        if place.is_relative_to(folder):
            return _fail(f"--out {out}: {error}", FAILED)
    return _fail(str(error), FAILED)


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
        return _fail_os(error, options.out)
    return OK


def _distill(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        return _fail("distill needs transformers: pip install 'seer_cuda[hf]'", MISSING)
    from seer_cuda.integrations.transformers._train import MODEL, Distill, distill

    chosen = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        path = distill(Distill(**chosen))
        if os.environ.get("RANK", "0") == "0":
            print(f"gates: {path}")
            if options.train_all:
                print(f"model: {path.parent / MODEL}")
    except ImportError as error:
        return _fail(str(error), MISSING)
    except ValueError as error:
        return _fail(str(error), USAGE)
    except OSError as error:
        return _fail_os(error, options.out)
    return OK


def _eval(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        return _fail("eval needs transformers: pip install 'seer_cuda[hf]'", MISSING)
    from seer_cuda.integrations.transformers._train import evaluate

    if (options.method is None) != (options.value is None):
        return _fail("--method and --value: expected both or neither, got one", USAGE)
    own = (options.densities, options.thresholds, options.calibration)
    if options.out is None and any(option is not None for option in own):
        return _fail("--densities, --thresholds, --calibration: expected --out, got none", USAGE)
    if options.out is not None and options.method is not None:
        return _fail("--method: expected none with --out, which has every density, got one", USAGE)
    try:
        if options.out is not None:
            return _study(options)
        result = evaluate(
            options.model,
            options.gates,
            options.text,
            context=options.context,
            windows=options.windows,
            rule=None if options.method is None else Rule(options.method, options.value, local=1),
            device=options.device,
        )
    except ImportError as error:
        return _fail(str(error), MISSING)
    except (ValueError, KeyError, FileNotFoundError) as error:
        # A KeyError's own text is in quotes.
        return _fail(str(error.args[0] if isinstance(error, KeyError) else error), USAGE)
    except OSError as error:
        return _fail_os(error, options.out)
    change = result.sparse / result.dense - 1
    print(f"dense perplexity   {result.dense:.4f}")
    print(f"sparse perplexity  {result.sparse:.4f}  ({change:+.2%})")
    print(f"kept blocks        {result.density:.1%} of the visible ones")
    return OK


def _study(options: argparse.Namespace) -> int:
    from seer_cuda.integrations.transformers import _report

    more = {
        name: getattr(options, name)
        for name in ("densities", "thresholds", "calibration")
        if getattr(options, name) is not None
    }
    result = _report.study(
        options.model,
        options.gates,
        options.text,
        options.out,
        context=options.context,
        windows=options.windows,
        device=options.device,
        **more,
    )
    print(_report.table(result["rows"]))
    print(f"written: {options.out}")
    return OK
