# SPDX-License-Identifier: Apache-2.0
"""docs/api.md: every public name of seer_cuda with its arguments and the first line of its help.

python tools/api_page.py            write the page
python tools/api_page.py --check    exit status 1 if the page is stale
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import seer_cuda

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
HEAD = """# The Python API

Written by `python tools/api_page.py` from the package: one line each. Shapes, dtypes, errors and
sources are in the help of every name, as in `help(seer_cuda.gate_select)`.
"""


def _summary(thing: object) -> str:
    """The first paragraph of the help, in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _call(name: str, function: Callable) -> str:
    """`name(arguments)` without annotations, self left out."""
    signature = inspect.signature(function)
    arguments = [
        argument.replace(annotation=inspect.Parameter.empty)
        for argument in signature.parameters.values()
        if argument.name not in ("self", "cls")
    ]
    plain = signature.replace(parameters=arguments, return_annotation=inspect.Signature.empty)
    return f"`{name}{plain}`"


def _members(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"- `.{name}`: {_summary(member)}"
        elif isinstance(member, (staticmethod, classmethod)):
            function = member.__func__
            yield f"- {_call(f'{cls.__name__}.{name}', function)}: {_summary(function)}"
        elif inspect.isfunction(member):
            yield f"- {_call(f'.{name}', member)}: {_summary(member)}"


def _functions(module: ModuleType) -> Iterator[str]:
    for name, thing in vars(module).items():
        own = inspect.isfunction(thing) and thing.__module__ == module.__name__
        if own and not name.startswith("_"):
            yield f"- {_call(f'{module.__name__}.{name}', thing)}: {_summary(thing)}"


def page() -> str:
    """The whole page."""
    public = {name: getattr(seer_cuda, name) for name in seer_cuda.__all__}
    functions = {name: x for name, x in public.items() if inspect.isfunction(x)}
    classes = {name: x for name, x in public.items() if inspect.isclass(x)}
    modules = {name: x for name, x in public.items() if inspect.ismodule(x)}
    lines = [HEAD, "## Functions", ""]
    lines += [f"- {_call(f'seer_cuda.{n}', x)}: {_summary(x)}" for n, x in functions.items()]
    lines += ["", "## Classes"]
    for name, cls in classes.items():
        lines += ["", f"### {_call(f'seer_cuda.{name}', cls)}", "", _summary(cls), ""]
        lines += _members(cls)
    lines += ["", "## Modules"]
    for name, module in modules.items():
        lines += ["", f"### seer_cuda.{name}", "", _summary(module), "", *_functions(module)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    text = page()
    if not options.check:
        PAGE.write_text(text)
        return 0
    if PAGE.read_text() == text:
        return 0
    print("docs/api.md is stale: python tools/api_page.py writes it.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
