"""The benchmark of GPUs at its rehearsal's sizes: every section gives figures, and one that fails stops no other."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is of a machine without a GPU")
def test_a_rehearsal_goes_through_all_sections(tmp_path: Path) -> None:
    names = [name for name in gpu.SECTIONS if name != "tests"]
    gpu.main(["--json", str(tmp_path / "gpu.json"), *(word for name in names for word in ("--section", name))])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["rehearsal"], found["failures"]) == (True, {})
    assert list(dict.fromkeys(each["section"] for each in found["figures"])) == names
    assert all(each["value"] >= 0 for each in found["figures"])
    assert {each["value"] for each in found["figures"] if each["what"].endswith("unlike float64")} == {0}


def test_a_section_without_time_is_named_and_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--seconds", "0", "--section", "step", "--section", "trial", "--json", str(tmp_path / "gpu.json")])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["failures"]) == ["step", "trial"]
    assert found["figures"] == []
    assert "step: was stopped" in capsys.readouterr().out
