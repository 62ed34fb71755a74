"""The linker: a trained model with its knowledge base, that links mentions nobody has prepared."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch

from dsmip.calibration.calibration import BestScores, Calibration
from dsmip.data.manifest import ImageSettings
from dsmip.data.records import NO_ROW, Mention
from dsmip.data.table import Table
from dsmip.encoders.feature_cache import whole_features
from dsmip.errors import UserError
from dsmip.evaluation.preparation import prepare_in_tiles
from dsmip.evaluation.ranks import NotRankable
from dsmip.linking.growing.entities import BundleEntities
from dsmip.linking.growing.preparation import ItemEncoder
from dsmip.linking.knowledge_base import KnowledgeBase
from dsmip.linking.links import Link, Links
from dsmip.linking.mentions import ImageFolder, ImageInput, MentionReader, Unreadable, records
from dsmip.linking.search import Best, ExactSearch, SecondStage

BATCH_SIZE = 64  # mentions that are linked at a time


@dataclass(frozen=True, slots=True)
class _Asked:
    """How mentions are linked; see `Linker.link`."""

    top: int
    min_confidence: float | None
    candidates: int | None
    explain: bool

    def __post_init__(self) -> None:
        _check_count("top", self.top)
        _check_count("candidates", 1 if self.candidates is None else self.candidates)


class _Unscored(UserError):
    """A score is NaN or infinite; `reason` says it without the model's place, as a service may to whoever asks."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class LinkedModel:
    """A model as a linker needs it.

    Attributes:
        name: The part's or the system's.
        source: Where it was opened, for messages.
        encoders: By part; the features of several parts go side by side.
        feature_dtype: In which features are kept when the model is evaluated.
        choices: The experts that it chooses from (may be none).
        images: How the data set's pictures were prepared.
        identity: Differs between models, weights, knowledge bases and calibrations that link differently.
    """

    name: str
    source: str
    encoders: Mapping[str, ItemEncoder]
    feature_dtype: torch.dtype
    choices: tuple[str, ...]
    images: ImageSettings
    identity: str


@dataclass(frozen=True)
class Origin:
    """Where a linker comes from.

    Attributes:
        reload: Opens what is there now.
        entities: Of a bundle, what changes its entities; else why they do not change.
    """

    reload: "Callable[[], Linker]"
    entities: BundleEntities | str


class Linker:
    """Links mentions to the entities of a knowledge base. `dsmip.load` makes one.

    Scores are those of `dsmip evaluate`: every entity of the knowledge base is scored, close ones in float64. What
    encoders say of a mention depends in its last bits on the batch that it is encoded in, so scores of the same mention
    may differ by rounding (1e-5 at a score of order one).

    Reading is safe from several threads; there is one copy of model and index however many use it.

    Attributes:
        model: What is linked with.
        knowledge_base: Its entities.
        search: Over all of them.
        second_stage: Re-ranks what the search finds, for a system that does; else None.
        calibration: Of this model and index (`dsmip calibrate`); None: links have no confidence, and `is_nil` is False.
    """

    def __init__(
        self,
        model: LinkedModel,
        knowledge_base: KnowledgeBase,
        search: ExactSearch,
        second_stage: SecondStage | None = None,
        calibration: Calibration | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.model, self.knowledge_base, self.search = model, knowledge_base, search
        self.second_stage, self.calibration = second_stage, calibration
        self.device, self._origin = search.device, origin
        for each in model.encoders.values():
            each.encoder.to(self.device).eval()

    def __repr__(self) -> str:
        return f"Linker({self.model.name} of {self.model.source}, {len(self)} entities, {self.device})"

    def __len__(self) -> int:
        """Entities in the knowledge base."""
        return len(self.knowledge_base)

    @property
    def entities(self) -> BundleEntities:
        """The entities of the bundle that this was opened from, to be changed; a change is seen by `reload`.

        Raises:
            UserError: It was not opened from a bundle in a folder of this machine.
        """
        found = "a linker that was made by hand has no bundle" if self._origin is None else self._origin.entities
        if isinstance(found, str):
            raise UserError(found)
        return found

    def reload(self) -> "Linker":
        """The linker of what is there now, with the entities as they are by now; this one stays as it is.

        Of a bundle whose model is the same, the model is not loaded again.

        Raises:
            UserError: It cannot be opened any more.
        """
        if self._origin is None:
            raise UserError("a linker that was made by hand has nothing to be opened from again")
        return self._origin.reload()

    def link(
        self,
        word: str,
        sentence: str = "",
        image: ImageInput = None,
        *,
        top: int = 5,
        min_confidence: float | None = None,
        candidates: int | None = None,
        explain: bool = False,
        desc: str = "",
    ) -> Links:
        """Links one mention.

        Args:
            word: The text that is to be linked.
            sentence: Where it stands.
            image: Its picture: a path, an encoded picture's bytes, a Pillow image, a uint8 array, or None.
            top: How many entities to return (at most all).
            min_confidence: Where a calibrated model takes the mention's entity for being in the knowledge base with a
                lower probability, `is_nil` is True (None: the model's own threshold).
            candidates: Score only so many entities, those that global vectors find: faster (unless experts are fused:
                they score all), and what they miss is lost. Their scores are the exact ones. None: all entities.
            explain: Also what each expert or unit says of each link (`Links.parts`).
            desc: A description of the mention, for models that read one (see `dsmip enhance`).

        Returns:
            Its links, best first.

        Raises:
            UserError: An empty word, a picture that cannot be read, `top` or `candidates` below 1, a `min_confidence`
                outside 0 to 1 or of a model that is not calibrated, a model that scores NaN, or one that has no global
                vectors and is asked for candidates.
        """
        asked = self._asked(top, min_confidence, candidates, explain)
        given = {"word": word, "sentence": sentence, "image": image, "desc": desc}
        return self._link_batch([MentionReader(self.model.images).read(given)], asked)[0]

    def link_many(
        self,
        mentions: Iterable[Mapping[str, Any] | Mention | Unreadable],
        *,
        top: int = 5,
        min_confidence: float | None = None,
        candidates: int | None = None,
        explain: bool = False,
        on_error: Literal["raise", "report"] = "raise",
        images: ImageFolder = None,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[Links]:
        """Links mentions in batches, in their order; a generator that reads no further than it has to.

        Args:
            mentions: Dicts with word, sentence and image (as for `link`; mention_id and desc are optional, other keys
                do not count), prepared `dsmip.Mention`s, an Arrow table, or a pandas frame of such columns.
            top: How many entities each gets (at most all).
            min_confidence, candidates, explain: As for `link`.
            on_error: `raise` at a mention that cannot be read or scores NaN, or `report`: it gets `Links` with a
                `reason` and no link, and the others are linked.
            images: The folder that relative paths of pictures start from (default: the present one), or what reads a
                picture of a name.
            batch_size: How many are linked at a time.

        Yields:
            The links of each mention.

        Raises:
            UserError: As for `link`, where it can be told with the number of the mention, from 0. A model that scores
                NaN whatever the mention is an error either way.
        """
        _check_count("batch_size", batch_size)
        asked, reader = self._asked(top, min_confidence, candidates, explain), MentionReader(self.model.images, images)
        given = records(mentions)
        batches = iter(lambda: list(islice(given, batch_size)), [])
        return self._linked(batches, asked, reader, on_error)

    def _asked(self, top: int, min_confidence: float | None, candidates: int | None, explain: bool) -> _Asked:
        if min_confidence is not None:
            if self.calibration is None:
                raise UserError(
                    f"min_confidence: {self.model.name} of {self.model.source} is not calibrated, it has no "
                    "confidences; 'dsmip calibrate' gives them to a run (export it again after that)"
                )
            if not 0 <= min_confidence <= 1:
                raise UserError(f"min_confidence: {min_confidence} is no probability; give one from 0 to 1")
        return _Asked(top, min_confidence, candidates, explain)

    def _linked(
        self, batches: Iterator[list[Any]], asked: _Asked, reader: MentionReader, on_error: str
    ) -> Iterator[Links]:
        number = 0
        for batch in batches:
            read: list[Mention | Links] = []
            for item in batch:
                try:
                    read.append(reader.read(item))
                except UserError as error:
                    if on_error == "raise":
                        raise UserError(f"mention {number}: {error}") from None
                    read.append(Links(_as_given(item), (), reason=str(error)))
                number += 1
            link = self._link_batch if on_error == "raise" else self._link_or_report
            found = iter(link([each for each in read if isinstance(each, Mention)], asked))
            for each in read:
                yield each if isinstance(each, Links) else next(found)

    def _link_or_report(self, mentions: Sequence[Mention], asked: _Asked) -> list[Links]:
        """As `_link_batch`, but those that score NaN have a reason; they are found by halving.

        Raises:
            UserError: The model scores NaN whatever the mention.
        """
        try:
            return self._link_batch(mentions, asked)
        except _Unscored as error:
            if len(mentions) == 1:
                if not self._is_sound(asked):
                    raise
                return [Links(mentions[0], (), reason=error.reason)]
        middle = len(mentions) // 2
        return [*self._link_or_report(mentions[:middle], asked), *self._link_or_report(mentions[middle:], asked)]

    def _is_sound(self, asked: _Asked) -> bool:
        """Whether the model scores a mention that is an entity's name alone."""
        (entity,) = self.knowledge_base.texts([0])
        try:
            return bool(self._link_batch([Mention("", entity["name"], "", "", NO_ROW)], asked))
        except _Unscored:
            return False

    def _link_batch(self, mentions: Sequence[Mention], asked: _Asked) -> list[Links]:
        if not mentions:
            return []
        best, parts = self._searched(mentions, asked)
        (right_M, known_M), min_confidence, links = self._probabilities(best), asked.min_confidence, list[Links]()
        if min_confidence is None:
            min_confidence = self.calibration.min_known if self.calibration else 0.0
        for row, (mention, right, known) in enumerate(zip(mentions, right_M, known_M, strict=True)):
            found, is_nil = self._links(best, row, asked.top, right), known is not None and known < min_confidence
            links.append(Links(mention, found, is_nil, known, parts=parts[row], knowledge_base=self.knowledge_base))
        return links

    def _probabilities(self, best: Best) -> tuple[Sequence[float | None], Sequence[float | None]]:
        """That each mention's best link is right, and that its entity is in the kb; None: not calibrated."""
        if self.calibration is None:
            unknown: list[float | None] = [None] * len(best.row_Mk)
            return unknown, unknown
        expert_Mk = torch.zeros_like(best.row_Mk) if best.chosen_Mk is None else best.chosen_Mk
        right_M, known_M = self.calibration.probabilities(BestScores(best.score_Mk, expert_Mk))
        return right_M.tolist(), known_M.tolist()

    def _searched(self, mentions: Sequence[Mention], asked: _Asked) -> tuple[Best, Sequence[Mapping[str, list[float]]]]:
        """As many of the best entities as are asked for and the calibration reads; what parts say of the former.

        Raises:
            UserError: A score is NaN or infinite.
        """
        wanted = max(asked.top, self.calibration.num_scores if self.calibration else 0)
        wanted = max(wanted, self.second_stage.candidates if self.second_stage else 0)
        try:
            informed = self.search.informed(self.prepared(mentions), for_best=asked.candidates is None)
            if asked.candidates is None:
                best = self.search.best(informed, wanted)
            else:
                best = self.search.best_of(informed.mentions, wanted, asked.candidates)
            if self.second_stage is not None:
                best = self.second_stage(best, mentions, self.knowledge_base)
            if not asked.explain:
                return best, [{}] * len(mentions)
            return best, self.search.part_scores(informed.mentions, best.row_Mk[:, : asked.top])
        except NotRankable as error:
            entity_id = self.knowledge_base.texts([error.entity_row])[0]["entity_id"]
            found = f"NaN or infinite{f' ({error.part})' if error.part else ''}"
            raise _Unscored(
                f"{self.model.name} of {self.model.source} scores '{mentions[error.mention].word}' and entity "
                f"{entity_id} as {found}; its training diverged, or their features are broken",
                f"mention: the model scores it as {found}",
            ) from None

    @torch.no_grad()
    def prepared(self, mentions: Sequence[Mention]) -> Table:
        """All that a pair needs of each mention: encoded and prepared as for an evaluation."""
        tables = {}
        for part, each in self.model.encoders.items():
            features = each.encoder.encode_mentions(each.collator.mentions(mentions).to(self.device))
            tables[part] = features.cast(self.model.feature_dtype)
        features = whole_features(tables, list(tables)) if len(tables) > 1 else next(iter(tables.values()))
        return prepare_in_tiles(self.search.matcher, features, "mentions", self.device)

    def _links(self, best: Best, mention: int, top: int, confidence: float | None) -> tuple[Link, ...]:
        rows, scores = (each[mention, :top].tolist() for each in (best.row_Mk, best.score_Mk))
        experts: list[str | None] = [None] * len(rows)
        if best.chosen_Mk is not None and self.model.choices:
            experts = [self.model.choices[each] for each in best.chosen_Mk[mention, :top].tolist()]
        links = [
            Link(text["entity_id"], row, text["name"], text["attributes"], score, expert=expert)
            for row, score, expert, text in zip(rows, scores, experts, self.knowledge_base.texts(rows), strict=True)
        ]
        if links and confidence is not None:
            links[0] = replace(links[0], confidence=confidence)
        return tuple(links)


def _as_given(item: Mapping[str, Any] | Mention) -> Mention:
    """What is there of a mention that could not be read."""
    if isinstance(item, Mention):
        return item
    given = item if isinstance(item, Mapping) else {}
    mention_id, word, sentence = (str(given.get(name) or "") for name in ("mention_id", "word", "sentence"))
    return Mention(mention_id, word, sentence, "", -1)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name}: {value}; give at least 1")
