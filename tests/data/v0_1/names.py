"""The public names of clipft 0.1's modules, read from its source: python names.py COMMIT > names.json.

Those in ``__all__``, or the functions and classes where a module has none.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def names_of(source: str) -> list[str]:
    body = ast.parse(source).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    public = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return sorted(name for name in public if not name.startswith("_"))


def main(commit: str) -> None:
    found = {}
    for path in git("ls-tree", "-r", "--name-only", "--full-tree", commit, "clipft/").split():
        if path.endswith(".py") and path != "clipft/__init__.py" and not path.endswith("__main__.py"):
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found[module] = names_of(git("show", f"{commit}:{path}"))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
