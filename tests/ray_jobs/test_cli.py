"""The command line as a user meets it: one clear message and exit code 2 for a mistake, no traceback, quick help."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.errors import StoreAway
from dsmip.runs.run import Run
from ray_jobs import cli
from tests.support.paths import ROOT


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs a command that must end with exit code 2; returns what it said on stderr."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dsmip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --config nothing --data D --run R", "'nothing' is neither a file nor a shipped name; shipped: .*demo"),
        ("train --config demo --data D --run R --set train.epocs=3", "train.epocs.*did you mean 'epochs'"),
        ("train --config demo --data D --run R --set train.epochs", "--set takes key=value"),
        ("train --config demo --data D --run R --set train.epochs=0", "train.epochs"),
        ("train --config demo --data D --run R", "D: no such dataset directory"),
        ("pretrain --config demo --data D --out w.pt", "must end in .safetensors"),
        ("pretrain --config demo --data D --out w.safetensors", "D: no such dataset directory"),
        ("pretrain --config demo --data D --out s3://b/w.safetensors", "neither a path here nor a URI"),
        ("demo --out s3://b/demo", "neither a path here nor a URI"),
        ("tune --run s3:/b/x", "neither a path here nor a URI"),
        ("tune --run R", "no run at .*R"),
        ("evaluate --run R", "no run at .*R"),
        ("compare R R", "no run at R"),
        ("status R", "no run at .*R"),
        ("compare R", "Missing argument 'RUN2'"),
        ("compare R R --json .", "is a directory"),
        ("inspect D", "D: no such dataset directory"),
        ("verify D", "D: no such dataset directory"),
        ("prepare S OUT --format tarball", "--format tarball is unknown; known: mimic, .*demo"),
        ("prepare S OUT --format demo", "takes a seed or a YAML file as SOURCE; 'S' is neither"),
        ("prepare S OUT", "S: no such folder"),
        ("prepare . OUT", "no layout that is known .*choose one by --format"),
        ("prepare . OUT --split 70/20", "--split 70/20: expected percentages"),
        ("prepare . OUT --split 70/20/20", "must add up to 100"),
        ("prepare . OUT --shard-size big", "--shard-size big: expected a size like 256MB"),
        ("prepare . OUT --entity-text title", "--entity-text"),
        ("prepare 0 OUT --format demo --split 70/10/20", "--split: a demo has what SOURCE says"),
        ("prepare 0 OUT --format demo --seed 1", "--seed: a demo has what SOURCE says"),
        ("prepare . OUT --train-fraction 0.5 --kb K", "--kb: a view .* has no such choice"),
        ("prepare . OUT --take first", "--take: says which mentions a view keeps"),
        ("prepare . OUT --train-fraction 0.5 --take first --seed 1", "--seed: --take first draws nothing"),
        ("prepare . OUT --train-fraction 0.5 --take last", "--take"),
        ("prepare . OUT --train-fraction 0.5", "takes a dataset directory; prepare the release without it"),
        ("prepare 0 /proc/none/out --format demo", "/proc/none: No such file"),
        ("enhance D OUT", "D: no such dataset directory"),
        ("enhance D OUT --url http://h/v1", "--url: belongs to --chooser endpoint; leave it out"),
        ("enhance D OUT --chooser endpoint --model m", "say by --url and --model whom to ask"),
        ("enhance D OUT --chooser best", "--chooser"),
        ("systems --set seed=1", "--set changes a configuration: name one by --config"),
        ("systems --config nothing", "'nothing' is neither a file nor a shipped name"),
        ("systems --config mimic_wikimel --set backbone.architecture=ViT-B-23", "unknown backbone .*nearest: ViT-B-32"),
        ("import mimik F --data D --run R", "unknown model 'mimik'; did you mean 'mimic'"),
        ("import clip F --data D --run R", "clip: no released checkpoints .*; there are of m3el, mimic, mmoe"),
        ("import mimic F --data D --run R --config m3el_wikimel", "is of m3el, not of mimic; leave it out"),
        ("import mimic F --data D --run R --set system.tune=frozen", "system.tune is frozen: .* set it to full"),
        ("import mimic F --data D --run R", "checkpoint F does not exist; needed is a .ckpt file"),
        ("import mimic F --run R", "Missing option '--data'"),
        ("link R", "say what to link: either --word .* or a file of mentions and --out"),
        ("link R mentions.jsonl", "mentions.jsonl: a file of mentions goes with --out"),
        ("link R mentions.jsonl --out o.parquet --sentence s", "and not with --sentence"),
        ("link R --word w --out o.parquet", "--out goes with a file of mentions"),
        ("link R mentions.csv --out o.parquet", r"mentions.csv: no such file of mentions, .*\(\.jsonl, \.parquet\)"),
        ("link R m/*.jsonl --out o.parquet", r"m/\*\.jsonl: no such file of mentions"),
        ("link R --word w", "R: neither a run nor a bundle"),
        ("export R OUT", "no run at R"),
        ("export R s3://b/x", "a bundle is made in a folder of this machine"),
        ("nonsense", "No such command"),
        ("s3://user:word@b/x", r"No such command 's3://\*\*\*@b/x'"),
        ("verify D s3://user:word@b/x", r"unexpected extra argument.*\(s3://\*\*\*@b/x\)"),
        ("train --config demo", "Missing option"),
    ],
)
def test_a_mistake_is_named(mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    import re

    assert re.search(said, mistake(*command.split()))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_away_is_one_line_and_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*arguments: object) -> None:
        raise StoreAway("s3://b/run: the store failed or cannot be reached")

    monkeypatch.setattr("ray_jobs.local_jobs.status.read_status", away)
    monkeypatch.setattr(sys, "argv", ["dsmip", "status", "s3://b/run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: s3://b/run: the store failed or cannot be reached\n"


def test_wrong_keys_of_the_demo_generator_are_named(mistake, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    settings = tmp_path / "world.yaml"
    settings.write_text("num_entitys: 200\n")
    said = mistake("prepare", settings, tmp_path / "out", "--format", "demo")
    assert "num_entitys" in said
    assert "num_entities" in said
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_alone(mistake, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "photo.txt").write_text("mine")
    assert "is not empty and holds no demo" in mistake("demo", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.txt"]


def test_what_a_run_does_not_have_is_named(  # type: ignore[no-untyped-def]
    mistake, tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    run = tmp_path / "run"
    made = Run.create(run, small_config, small_data)
    assert "run 'dsmip train' first" in mistake("evaluate", "--run", run, "--model", "text")
    assert "run 'dsmip tune' first" in mistake("evaluate", "--run", run)
    assert "unknown model 'sound'" in mistake("evaluate", "--run", run, "--model", "sound")
    assert "unknown split 'dev'" in mistake("evaluate", "--run", run, "--split", "dev")
    assert "is no device" in mistake("evaluate", "--run", run, "--device", "toaster")
    assert "backend triton runs on a GPU" in mistake("evaluate", "--run", run, "--backend", "triton", "--workers", 2)
    assert "precision fp16 needs a GPU" in mistake("evaluate", "--run", run, "--precision", "fp16")
    assert "did you mean 'trials'" in mistake("tune", "--run", run, "--set", "tune.trails=3")
    assert "seed was 0, is now 1, but stage one is over" in mistake("tune", "--run", run, "--set", "seed=1")
    assert "tune.rungs ends at 18 epochs" in mistake("tune", "--run", run, "--set", "tune.train.epochs=5")
    (made.training_folder / "text" / "checkpoint_0").mkdir(parents=True)
    assert "was made with another configuration (seed was 0, is now 1)" in mistake(
        "train", "--config", run / "config.yaml", "--data", small_data.folder, "--run", run, "--set", "seed=1"
    )


def test_help_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from ray_jobs import cli; sys.argv = ['dsmip', 'train', '--help']\n"
        "try: cli.main()\n"
        "finally: print([name for name in ('ray', 'torch') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "--config" in said
    assert said.rstrip().endswith("[]")


@pytest.mark.parametrize("job", ["prepare", "features", "pretrain", "train_experts", "tune_gate", "evaluate"])
def test_jobs_are_scripts_for_ray_job_submit(job: str) -> None:
    source = (Path(cli.__file__).parent / f"{job}.py").read_text(encoding="utf-8")
    assert source.rstrip().splitlines()[-1].startswith('    run_script("')
    asked = [sys.executable, f"ray_jobs/{job}.py", "--help"]
    by_script = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT).stdout
    assert "Usage:" in by_script


def test_the_package_is_the_command() -> None:
    said = [
        subprocess.run([*command, "evaluate", "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
        for command in ([sys.executable, "-m", "ray_jobs"], [str(Path(sys.executable).with_name("dsmip"))])
    ]
    assert said[0].partition("\n\n")[2] == said[1].partition("\n\n")[2] != ""
