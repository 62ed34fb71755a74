"""The public face: `import dsmip` is light, and README's example runs."""

import json
import re
import subprocess
import sys

import pytest

import dsmip
from dsmip.data.dataset import Dataset
from dsmip.runs.provenance import RECORDS
from dsmip.runs.run import Run
from tests.support.paths import ROOT


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, dsmip; dsmip.UserError; print(dsmip.__version__, [name for name in ('torch', 'numpy', 'ray', "
        "'pydantic', 'pyarrow', 'open_clip') if name in sys.modules]); dsmip.Mention; print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.split("\n")[:2] == [f"{dsmip.__version__} []", "False"]


def test_every_public_name_is_there() -> None:
    assert {*dsmip.__all__} <= {*dir(dsmip)}
    assert all(getattr(dsmip, name) for name in dsmip.__all__)
    assert dsmip.Mention("m", "word", "a word", "Q1", 0).image is None
    assert {"dsmip", "mimic"} <= {*dsmip.systems()}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dsmip.nothing  # noqa: B018
    with pytest.raises(dsmip.UserError, match="no such dataset directory"):
        dsmip.open_dataset("nowhere")


def test_the_readme_example_runs(run: Run, small_data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In your own code")[2]
    lines = re.findall(r"^    (.*)$", section.partition("\n## ")[0], flags=re.MULTILINE)
    code = "\n".join(lines).replace("demo/data", str(small_data.folder)).replace("demo/run", str(run.folder))
    assert code.startswith("import dsmip")
    assert 5 <= len([line for line in lines if line]) <= 7
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "11" in said
    assert "dsmip" in said
    metrics = dsmip.evaluate(run.folder, "test").metrics
    assert f"{metrics['overall']['hits@1']:.3f}" in said
    assert capsys.readouterr().out == ""


def test_an_evaluation_leaves_a_record_as_the_command_does(run: Run) -> None:
    before = {*(run.folder / RECORDS).glob("*")}
    dsmip.evaluate(run.folder, "validation", "text")
    with pytest.raises(dsmip.UserError, match="unknown model"):
        dsmip.evaluate(run.folder, "validation", "nothing")
    records = [json.loads(path.read_text()) for path in sorted({*(run.folder / RECORDS).glob("*")} - before)]
    assert [(record["command"], record["outcome"].partition(":")[0]) for record in records] == [
        ("evaluate", "finished"),
        ("evaluate", "failed"),
    ]
