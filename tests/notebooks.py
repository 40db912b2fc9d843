"""Runs a notebook's cells and keeps in it what they print and show: python -m tests.notebooks FILE.

The cells are plain Python without magics, so Python alone runs them, in one namespace and in this
process: the tests need no Jupyter, and share their compiled programs.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

PARAMETERS = "parameters"  # tag of the cell whose values can be replaced


def execute(notebook: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    """Runs the code cells; their outputs replace those in `notebook`.

    Args:
        notebook: as the file has it.
        parameters: values of the names that the cell tagged 'parameters' sets.

    Returns:
        The namespace after the last cell.
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    code_cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    for count, cell in enumerate(code_cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            shown = _run("".join(cell["source"]), f"cell {count}", scope)
        if PARAMETERS in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= scope.keys()
            scope.update(parameters)
        cell["execution_count"] = count
        cell["outputs"] = []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": lines})
        if shown is not None:
            cell["outputs"].append(_result(shown, count))
    return scope


def _run(source: str, name: str, scope: dict[str, Any]) -> Any:
    """Runs a cell and gives the value of its last line if that is an expression."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), scope)
    return eval(compile(ast.Expression(last.value), name, "eval"), scope) if last else None


def _result(value: Any, count: int) -> dict[str, Any]:
    data = {"text/plain": [type(value).__name__]}
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return {
        "data": data,
        "execution_count": count,
        "metadata": {},
        "output_type": "execute_result",
    }


if __name__ == "__main__":
    file = Path(sys.argv[1])
    content = json.loads(file.read_text())
    execute(content)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
