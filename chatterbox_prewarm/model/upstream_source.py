"""Details of what upstream's models do. Those that differ between its versions are found by reading its source.

Its wheel and its main branch share a version. The lean packages do not contain upstream. What the pinned wheel (0.1.7)
does is assumed there.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Details in which variants, and versions of upstream, differ.

    Attributes:
        repetition_penalty: the default of upstream's `generate`.
        analyzes_alignment: T3 decides by its attention when the speech ends.
        dropped_tokens: the number of speech tokens at the end whose audio is left out.
        silence: speech tokens that are added at the end.
    """

    repetition_penalty: float
    analyzes_alignment: bool = False
    dropped_tokens: int = 0
    silence: tuple[int, ...] = ()


#: The behaviour of the main branch. No other source loads T3 v3.
MAIN_BRANCH = Behaviour(repetition_penalty=1.2, dropped_tokens=1)


@functools.cache
def installed_multilingual() -> Behaviour:
    """Read the installed source, without importing it."""
    package = installed_package()
    return read_multilingual(package) if package else Behaviour(repetition_penalty=2.0, analyzes_alignment=True)


def installed_package() -> Path | None:
    """Return the folder of the installed upstream, or None if it is not installed."""
    spec = importlib.util.find_spec("chatterbox")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def loader_parameters(module: str) -> frozenset[str]:
    """Return the parameters of `from_local` in a module of the installed upstream; empty if there is no such module."""
    package = installed_package()
    if package is None or not (path := package / f"{module}.py").is_file():
        return frozenset()
    return frozenset(argument.arg for argument in _function(path, "from_local").args.args)


def read_multilingual(package: Path) -> Behaviour:
    """Read the source in the folder `package`."""
    t3 = ast.parse((package / "models" / "t3" / "t3.py").read_text(encoding="utf-8"))
    generate = _function(package / "mtl_tts.py", "generate")
    names = [argument.arg for argument in generate.args.args]
    defaults = dict(zip(reversed(names), reversed(generate.args.defaults), strict=False))
    return Behaviour(
        repetition_penalty=float(ast.literal_eval(defaults["repetition_penalty"])),
        analyzes_alignment="AlignmentStreamAnalyzer" in _names(t3),
        # The main branch cuts the audio by a number of samples that it computes from this rate.
        dropped_tokens=1 if "S3_TOKEN_RATE" in _names(generate) else 0,
    )


def _function(path: Path, name: str) -> ast.FunctionDef:
    """Return the first function with this name in a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
