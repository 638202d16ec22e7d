"""What LaTeX tables of ours have in common."""

from __future__ import annotations

import re


def check_latex(text: str) -> None:
    """Balanced braces and environments, equal column counts, nothing special left bare."""
    bare = re.sub(r"\\[\\{}$&%#_]", "", text)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    assert text.isascii()
    assert [line for line in bare.splitlines() if "%" in line] == [bare.splitlines()[0]]
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") >= 1
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}")
    for block in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, flags=re.S):
        size = len(re.match(r"\{(l?r*)\}", block)[1])  # type: ignore[index]
        assert size >= 1
        rows = re.findall(r"^(?!\\(?:top|mid|bottom|cmid)rule)(.+) \\\\$", block, flags=re.M)
        assert rows
        for row in rows:
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            cells = len(re.findall(r"(?<!\\)&", row)) + 1
            assert cells + sum(spans) - len(spans) == size, row
            assert not row.lstrip().startswith(("[", "*"))
        rules = [int(last) for last in re.findall(r"\\cmidrule\(lr\)\{\d+-(\d+)\}", block)]
        assert max(rules, default=size) == size
