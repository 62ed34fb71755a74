"""Tables as Markdown and as LaTeX (with booktabs)."""

import re
from collections.abc import Iterable

from dsmip.suites.tables import Entry, TableView

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\u00b1": r"$\pm$",
    "\u2020": r"$^\dagger$",
}
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#])")


def markdown(table: TableView) -> str:
    """A table as GitHub and pandoc read it, with its title and notes."""
    lines = [f"### {_plain(table.title)}", "", _line(map(_plain, table.header))]
    lines.append(_line(["---", *["---:"] * (len(table.header) - 1)]))
    lines += [
        _line(f"**{_plain(each.text)}**" if each.bold else _plain(each.text) for each in row) for row in table.rows
    ]
    return "\n".join([*lines, "", *(f"{_plain(note)}\n" for note in table.notes)])


def latex(table: TableView, label: str) -> str:
    """A floating table; figures stand right, the first column left."""
    lines = [r"\begin{table}", r"  \centering", rf"  \caption{{{latex_text(table.title)}}}", rf"  \label{{{label}}}"]
    lines += [rf"  \begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"    \toprule"]
    lines += [_row(latex_text(each) for each in table.header), r"    \midrule"]
    lines += [_row(_latex_entry(each) for each in row) for row in table.rows]
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    lines += [rf"  \par\footnotesize {latex_text(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}", ""])


def latex_text(text: str) -> str:
    """The text with LaTeX's own characters as characters."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_entry(entry: Entry) -> str:
    return rf"\textbf{{{latex_text(entry.text)}}}" if entry.bold else latex_text(entry.text)


def _row(texts: Iterable[str]) -> str:
    return f"    {' & '.join(texts)} \\\\"


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _plain(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)
