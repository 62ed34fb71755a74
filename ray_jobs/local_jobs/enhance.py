"""The job `dsmip enhance`: descriptions for mentions, chosen among those of their name. Knows no Ray."""

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.enhancement.answers import PROMPT, by_endpoint, check_prompt
from data_prep.enhancement.bm25 import Bm25
from data_prep.enhancement.choosers import Chooser, lexical
from data_prep.enhancement.descriptions import of_file, of_knowledge_base
from data_prep.enhancement.endpoint import Endpoint, EndpointOptions
from data_prep.enhancement.enhance import Enhanced, enhance
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.runs.provenance import write_record
from dsmip.storage.atomic import sha256_file
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.storage.locations import local_path
from ray_jobs.terminal.display import Display

_PROBE = "Answer with the number 1."


@dataclass(frozen=True, slots=True)
class EnhanceOptions:
    """What mentions' descriptions are chosen from, and how.

    Attributes:
        descriptions: A file of them; None: the knowledge base's own names and texts.
        language: Of such a file, where it is Wikidata's own dump.
        candidates: How many a mention has at most.
        endpoint: Who chooses; None: BM25 over the sentence.
        prompt: A file with the question to the endpoint; None: `PROMPT`.
    """

    descriptions: Path | None = None
    language: str = "en"
    candidates: int = 10
    endpoint: EndpointOptions | None = None
    prompt: Path | None = None


def enhance_data(data: str, out: str, options: EnhanceOptions, display: Display) -> Enhanced:
    """Makes the dataset directory `out`, and says how many mentions have a description.

    Raises:
        UserError: For wrong data, options or places, or an endpoint that answers nonsense.
        EndpointAway: The endpoint cannot be reached; what it has answered is kept.
    """
    folder = local_path(out)
    if folder is None:
        raise UserError(f"{out}: an enhanced dataset is made in a folder of this machine; give one as OUT")
    dataset, path = Dataset.open(data), options.descriptions
    if path is not None and not path.is_file():
        raise UserError(f"descriptions {path} do not exist")
    table = of_knowledge_base(dataset) if path is None else of_file(path, options.language)
    settings: dict[str, Any] = {"descriptions": "knowledge base"}
    if path is not None:
        settings = {"descriptions": path.name, "sha256": sha256_file(path), "language": options.language}
    title, started = "lexical", datetime.now(UTC)
    endpoint = prompt = None
    if options.endpoint is not None:
        endpoint, prompt = Endpoint(options.endpoint), _prompt(options.prompt)
        title = f"endpoint {options.endpoint.model}"
        settings |= {"model": options.endpoint.model, "prompt": prompt}

    def chooser(bm25: Bm25, answers: Path) -> Chooser:
        if endpoint is None or prompt is None:
            return lexical(bm25)
        endpoint.ask(_PROBE)  # what cannot work ends before the table is read
        return by_endpoint(endpoint, prompt, answers, display)

    display.interrupted = lambda: f"interrupted; answers are kept in {out}: run the command again to go on"
    with display:
        made = enhance(
            dataset,
            folder,
            table,
            {"chooser": "lexical" if endpoint is None else "endpoint", **settings},
            chooser,
            title=title,
            num_candidates=options.candidates,
            progress=display,
        )
    if made.counts is None:
        display.say(f"{out}: is complete already")
        return made
    write_record(folder, "enhance", started, data_sha256=sha256_file(folder / MANIFEST_FILE))
    counts = made.counts
    display.say(
        f"{out}: {counts['described']} of {counts['mentions']} mentions have a description; "
        f"{counts['candidates']} have candidates by name, {counts['exact']} by the very name"
    )
    display.say(f"  next: {shlex.join(['dsmip', 'inspect', out])} says how often it is the gold's own text")
    return made


def _prompt(path: Path | None) -> str:
    if path is None:
        return PROMPT
    try:
        prompt = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt {path} cannot be read as text: {error}") from None
    check_prompt(prompt, f"--prompt {path}")
    return prompt
