"""Print docs/api.md, the reference of the public Python names: `python docs/api.py > docs/api.md`."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def reference() -> str:
    """Return the page: for each public name its signature, its docstring and its public methods."""
    sys.path.insert(0, str(ROOT))
    import chatterbox_prewarm

    parts = [
        "# Python reference",
        "The docstrings of the public names, written by `docs/api.py`. [python.md](python.md) shows how to use them.",
    ]
    for name in chatterbox_prewarm.__all__:
        item = getattr(chatterbox_prewarm, name)
        parts += [f"## {name}", _entry(name, item)]
        if inspect.isclass(item):
            for method, member in vars(item).items():
                if not method.startswith("_") and (function := _function(member)):
                    parts += [f"### {name}.{method}", _entry(method, function)]
    return "\n\n".join(parts) + "\n"


def _function(member: Any) -> Any:
    """Return what a member of a class documents: a function, or a property; None for anything else."""
    if isinstance(member, (classmethod, staticmethod)):
        return member.__func__
    return member if inspect.isfunction(member) or isinstance(member, property) else None


def _entry(name: str, item: Any) -> str:
    """Return the signature and the docstring as code blocks."""
    documentation = inspect.getdoc(item) or ""
    if isinstance(item, property):
        return f"```text\n{documentation}\n```"
    if inspect.isclass(item) and "__init__" not in vars(item):  # made by a class method
        return f"```text\n{documentation}\n```"
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(item)))  # annotations are strings
    signature = re.sub(r"PosixPath\(([^)]*)\)", r"\1", signature)
    if inspect.isclass(item):
        signature = signature.removesuffix(" -> None")
    signature = re.sub(r"<(?:bound method|function) ([\w.]+)[^>]*>", r"\1", signature)
    if len(name) + len(signature) > 100:
        signature = _wrapped(signature[1:])
    return f"```python\n{name}{signature}\n```\n\n```text\n{documentation}\n```"


def _wrapped(parameters: str) -> str:
    """Put each parameter on a line of its own. Commas within brackets do not separate parameters."""
    inner, _, returns = parameters.rpartition(")")
    lines, depth, start = [], 0, 0
    for position, character in enumerate(inner):
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            lines.append(inner[start:position].strip())
            start = position + 1
    lines.append(inner[start:].strip())
    lines = [line if len(line) <= 110 else f"{line.partition(' = ')[0]} = ..." for line in lines]
    return "(\n" + "".join(f"    {line},\n" for line in lines) + ")" + returns


if __name__ == "__main__":
    sys.stdout.write(reference())
