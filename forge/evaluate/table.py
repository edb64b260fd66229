"""A comparison of models as text: cells for a terminal, Markdown, and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from forge.errors import harmless
from forge.evaluate.compare import Comparison, ScoreCell

_ARROWS = {"max": "↑", "min": "↓"}
_LATEX_ARROWS = {"max": r"$\uparrow$", "min": r"$\downarrow$"}
_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_MARKDOWN_SPECIAL = re.compile(r"([\\|*_`\[\]<>])")


def header_of(comparison: Comparison) -> list[str]:
    """`model`, then the task, the metric and its better direction of each column."""
    return ["model", *(f"{one.task} {one.value_name} {_ARROWS[one.direction]}" for one in comparison.columns)]


def cells_of(comparison: Comparison) -> list[list[str]]:
    """The rows of the table as text: `27.4 [25.9, 28.8] p=0.012`."""
    return [
        [harmless(model), *map(_plain, row)] for model, row in zip(comparison.models, comparison.rows, strict=True)
    ]


def to_markdown(comparison: Comparison) -> str:
    """The table, the differences between the jobs, and the signatures, in Markdown; the best scores are bold."""
    rows = [
        [_markdown(model), *(_bold(cell, mark="**") for cell in row)]
        for model, row in zip(comparison.models, comparison.rows, strict=True)
    ]
    parts = [_markdown_table([_markdown(one) for one in header_of(comparison)], rows)]
    parts.append(_caption(comparison))
    if comparison.differences:
        names = ["job", *map(_markdown, comparison.models)]
        values = [
            [f"`{_one_line(one.key)}`", *(_markdown(shown(value)) for value in one.values)]
            for one in comparison.differences
        ]
        parts.append(_markdown_table(names, values))
    parts += [f"- {_markdown(note)}" for note in comparison.notes]
    parts.append("\n".join(f"- `{_one_line(line)}`" for line in signatures(comparison)))
    return "\n\n".join(parts) + "\n"


def to_latex(comparison: Comparison) -> str:
    """The table as a `tabular` of the package booktabs; * marks p < 0.05 and ** p < 0.01."""
    columns = [
        f"{latex_text(one.task)} {latex_text(one.value_name)} {_LATEX_ARROWS[one.direction]}"
        for one in comparison.columns
    ]
    lines = [
        *(f"% {_one_line(line)}" for line in (_caption(comparison), *comparison.notes, *signatures(comparison))),
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["model", *columns]) + r" \\",
        r"\midrule",
    ]
    for model, row in zip(comparison.models, comparison.rows, strict=True):
        lines.append(" & ".join([latex_text(model), *map(_latex, row)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def signatures(comparison: Comparison) -> list[str]:
    """How each metric was computed, each once."""
    return list(dict.fromkeys(f"{one.task} {one.signature} n={one.num_examples}" for one in comparison.columns))


def number(value: float) -> str:
    """A score with three or four significant digits: `0.734`, `27.43`, `12345`."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.3g}"
    digits = next(digits for least, digits in ((1000, 0), (100, 1), (2, 2), (0, 3)) if size >= least)
    return f"{value:.{digits}f}"


def shown(value: Any) -> str:
    """A value of a job on one line."""
    if value is None:
        return "–"
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return f"{value}"[:200]
    return str(value)[:200]


def latex_text(text: str) -> str:
    """Text with the special characters of LaTeX escaped."""
    return "".join(_LATEX_SPECIAL.get(character, character) for character in _one_line(text))


def _plain(cell: ScoreCell | None) -> str:
    if cell is None:
        return "–"
    text = f"{number(cell.score)} [{number(cell.low)}, {number(cell.high)}]"
    return text if cell.p_value is None else f"{text} p={_p(cell.p_value)}"


def _bold(cell: ScoreCell | None, *, mark: str) -> str:
    if cell is None or not cell.is_best:
        return _plain(cell)
    score = number(cell.score)
    return f"{mark}{score}{mark}{_plain(cell).removeprefix(score)}"


def _latex(cell: ScoreCell | None) -> str:
    if cell is None or math.isnan(cell.score):
        return "--"
    score = number(cell.score).replace("∞", r"$\infty$")
    score = rf"\textbf{{{score}}}" if cell.is_best else score
    p = math.nan if cell.p_value is None else cell.p_value
    stars = "^{**}" if p < 0.01 else "^{*}" if p < 0.05 else ""
    interval = f"[{number(cell.low)}, {number(cell.high)}]".replace("∞", r"$\infty$").replace("–", "--")
    return rf"{score}{f'${stars}$' if stars else ''} {{\scriptsize {interval}}}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _caption(comparison: Comparison) -> str:
    text = "95 % bootstrap intervals"
    if len(comparison.models) > 1:
        first = _one_line(comparison.models[0])
        text += f"; p of the paired bootstrap against {first}, not corrected for several comparisons"
    return text + "."


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(harmless(text).split())
