"""Tables compile in a real LaTeX with booktabs."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.report.test_tables import run
from vipbench.harness.evaluation.statistics.intervals import Interval
from vipbench.harness.report.tables import make_table, to_latex
from vipbench.harness.report.tables.layout import Layout
from vipbench.harness.report.tables.reported import Reported, add_reported

SIGNS = r"""a_b %100 $x$ #1 {c} \d ~e ^f & <g> "h" | [i] * – ± † ‡ ≥ ≤ × é"""
DOCUMENT = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n%s\n%s\n\\end{document}\n"


def has_latex() -> bool:
    """Check for LaTeX and booktabs."""
    if not shutil.which("pdflatex") or not shutil.which("kpsewhich"):
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode == 0


@pytest.mark.integration
@pytest.mark.skipif(not has_latex(), reason="needs LaTeX: Debian's texlive-latex-base and texlive-latex-recommended")
def test_tables_compile(tmp_path: Path) -> None:
    methods = ("[vip]", SIGNS, "*coop", "tip")
    rows = [run(name, 16, seed, value + seed / 20) for value, name in enumerate(methods) for seed in (1, 2)]
    for row in rows:
        row["metrics.accuracy"] /= 4
    rows[0]["doubtful"] = True
    table = make_table(pd.DataFrame(rows).fillna({"doubtful": False}), ["method"], ["shots"], ["accuracy", "ece"])
    cells = {place: replace(cell, interval=Interval(0.1, 0.9, "t % & _")) for place, cell in table.cells.items()}
    reported = Reported(row={"method": SIGNS}, source=SIGNS, cells=({"metric": "ece", "mean": 10.0},))  # type: ignore[arg-type]
    table = add_reported(replace(table, cells=cells), [reported])
    framed = replace(table, layout=Layout(caption=SIGNS, label="tab:a_b", names={"accuracy": SIGNS}))
    (tmp_path / "tables.tex").write_text(DOCUMENT % (to_latex(table, show_runs=True), to_latex(framed, True)))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 1000
    assert "Missing character" not in (tmp_path / "tables.log").read_text(errors="replace")
