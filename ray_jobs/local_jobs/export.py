"""The jobs `dsmip export` (a model as a bundle, and onto the hub) and `export-ranks` (ranks as TREC files). No Ray."""

import shlex
from collections import Counter
from pathlib import Path

from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError
from dsmip.evaluation.stored.ranks import read_ranks
from dsmip.exporting.export import ExportOptions, export_run
from dsmip.exporting.trec import write_trec
from dsmip.linking.bundle import CALIBRATION
from dsmip.linking.found_bundles import push_bundle
from dsmip.rank_options import device_here
from dsmip.storage.locations import Location
from ray_jobs.terminal.display import Display


def export_bundle(run: Location, out: Path, device: str, options: ExportOptions, push: str | None = None) -> None:
    """Makes the bundle `out`, says how large it is, and puts it onto the hub as `push`.

    Raises:
        UserError: For a run, model or folder that cannot be used, or a hub that refuses.
    """
    display = Display()
    display.interrupted = lambda: f"interrupted; nothing is left at {out}"
    with display:
        manifest = export_run(run, out, device_here(device), options, display, display.say)
    sizes = Counter[str]()
    for name, file in manifest.files.items():
        sizes[name.partition("/")[0]] += file.bytes
    shown = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.most_common(4))
    display.say(f"{out}: {manifest.model} with {manifest.entities} entities; MiB: {shown}")
    if not any(name.startswith("files/backbone") for name in manifest.files):
        display.say("  the backbone's weights are not in it: its tag brings them (--with-backbone puts them in)")
    if CALIBRATION not in manifest.files:
        given = {"--model": options.model, "--data": options.data}
        more = [each for name, value in given.items() if value for each in (name, str(value))]
        calibrate = ["dsmip", "calibrate", "--run", str(run), *more]
        display.say(f"  no confidences: run '{shlex.join(calibrate)}' and export again")
    display.say(f"  next: {shlex.join(['dsmip', 'link', str(out), '--word', 'W', '--sentence', 'S'])}")
    if push is not None:
        address = push_bundle(out, push)
        display.say(f"  on the hub: dsmip.load({address!r})")


def export_trec(run: Location, out: Path, split: str, model: str | None) -> None:
    """Writes TREC files of a model's stored ranks into the folder `out`, and says what they hold.

    Raises:
        UserError: For an unknown split or model, or one that has not been evaluated.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}'; there are {', '.join(SPLITS)}")
    stored = read_ranks(run, split, model)
    files = write_trec(stored, out)
    display = Display()
    display.say(f"{files.run}, {files.qrels}: {files.mentions} mentions of {split}, {files.depth} entities each")
    if files.golds_outside:
        display.say(
            f"  {files.golds_outside} golds are not among them: figures beyond the first {files.depth} need "
            f"{stored.command} --top-k N"
        )
    if files.by_rank:
        display.say("  scores are minus the ranks: the model's own do not keep the order (ties, or re-ranked entities)")
