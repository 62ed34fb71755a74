"""The demo's release: a drawn world of heraldic houses, written in the MIMIC layout.

Names are ambiguous, sentences tell facts or stay vague, images show the answer, hide some of it or show another
house: no single modality is enough for all kinds of mentions (see `data_prep.demo.mentions`). About half of the
answers of validation and of test are never an answer in training, and the two have no such unseen answer in common.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.demo.drawing import photograph, plate
from data_prep.demo.mentions import KINDS, Kind, MentionDrawer, MentionPlan, MentionRates
from data_prep.demo.text import attributes
from data_prep.demo.world import MAX_HOUSES, Evidence, House, make_houses
from dsmip.errors import UserError
from dsmip.progress import Progress, no_progress
from dsmip.storage.atomic import naming_full_disk, write_text


class KindRates(BaseModel):
    """Relative frequency of the kinds of mentions, the same in every split; see `data_prep.demo.mentions`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    easy: float = Field(0.1, ge=0)
    text: float = Field(0.28, ge=0)
    missing_picture: float = Field(0.1, ge=0)
    picture: float = Field(0.16, ge=0)
    pointing: float = Field(0.18, ge=0)
    both: float = Field(0.18, ge=0)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if sum(getattr(self, kind) for kind in KINDS) <= 0:
            raise ValueError("at least one kind needs a rate above 0")
        return self


class DemoConfig(BaseModel):
    """Configuration of the demo's world. All shares are in 0..1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0)
    num_entities: int = Field(1000, ge=100, le=MAX_HOUSES)
    num_train: int = Field(1800, ge=1)
    num_validation: int = Field(400, ge=1)
    num_test: int = Field(1000, ge=1)
    picture_size: int = Field(64, ge=32, le=512)
    kinds: KindRates = KindRates()
    entities_without_picture: float = Field(0.08, ge=0, le=0.5)
    unseen_answers: float = Field(0.5, ge=0, le=1)  # of the validation and test mentions
    damaged_pictures: float = Field(0.25, ge=0, le=1)  # where the kind leaves it open
    misleading_namesakes: float = Field(0.7, ge=0, le=1)  # of the misleading images; the others are of any house
    roughness: float = Field(0.5, ge=0, le=1.5)  # of mention images: scales every perturbation


def draw_demo(config: DemoConfig) -> tuple[list[House], dict[str, list[MentionPlan]]]:
    """The houses by row and the mentions of the splits train, dev and test, without their images.

    Raises:
        UserError: There are too few houses for a kind of mention.
    """
    rng = Random(f"{config.seed}/world")
    houses = make_houses(config.num_entities, config.entities_without_picture, rng)
    drawer = MentionDrawer(Evidence(houses), MentionRates(config.damaged_pictures, config.misleading_namesakes))
    rows = rng.sample(range(len(houses)), len(houses))
    first, second = round(0.6 * len(rows)), round(0.75 * len(rows))
    seen, unseen = rows[:first], {"train": [], "dev": rows[first:second], "test": rows[second:]}
    sizes = {"train": config.num_train, "dev": config.num_validation, "test": config.num_test}
    plans = {}
    for split, size in sizes.items():
        num_unseen = round(config.unseen_answers * size) if unseen[split] else 0
        plans[split] = [
            *_draw_plans(drawer, seen, _kind_counts(config.kinds, size - num_unseen), rng),
            *_draw_plans(drawer, unseen[split], _kind_counts(config.kinds, num_unseen), rng),
        ]
        rng.shuffle(plans[split])
    return houses, plans


def write_demo_release(config: DemoConfig, folder: Path, progress: Progress = no_progress) -> None:
    """Writes the release: kb_entity.json, qid2id.json, DEMO_{train,dev,test}.json, kb_image/ and mention_image/.

    Args:
        config: What to draw; the same configuration gives the same bytes.
        folder: Where to, a new or empty folder.
        progress: Called after every image.

    Raises:
        UserError: The folder already holds something, or the world is too small for the mentions that are asked for.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something: name a new folder for the demo release, or delete it")
    houses, plans = draw_demo(config)
    for name in ("kb_image", "mention_image"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    done = 0
    total = sum(house.has_image for house in houses)
    total += sum(plan.shown is not None for split in plans.values() for plan in split)

    def write_image(path: Path, image: bytes) -> None:
        nonlocal done
        with naming_full_disk(path.parent):
            path.write_bytes(image)
        done += 1
        progress("pictures", done, total)

    for row, house in enumerate(houses):
        if house.has_image:
            write_image(folder / "kb_image" / f"{_entity_id(row)}.jpg", plate(house.arms, config.picture_size))
    number = 0
    for split, split_plans in plans.items():
        records = []
        for plan in split_plans:
            record = _mention_record(number, plan, houses)
            if plan.shown is not None:
                write_image(folder / "mention_image" / record["imgPath"], _draw_image(config, number, plan, houses))
            records.append(record)
            number += 1
        _write_json(folder / f"DEMO_{split}.json", records)
    _write_json(folder / "qid2id.json", {_entity_id(row): row for row in range(len(houses))})
    _write_json(folder / "kb_entity.json", [_entity_record(row, house) for row, house in enumerate(houses)])


def _kind_counts(rates: KindRates, size: int) -> dict[Kind, int]:
    """Number of mentions of each kind, adding up to `size`: rates rounded by largest remainder."""
    weights = {kind: float(getattr(rates, kind)) for kind in KINDS}
    exact = {kind: size * weight / sum(weights.values()) for kind, weight in weights.items()}
    counts = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(KINDS, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: size - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _draw_plans(drawer: MentionDrawer, pool: Sequence[int], counts: dict[Kind, int], rng: Random) -> list[MentionPlan]:
    plans = []
    for kind, count in counts.items():
        golds = drawer.eligible(kind, pool)
        plans += [drawer.draw(kind, golds, rng) for _ in range(count)]
    return plans


def _draw_image(config: DemoConfig, number: int, plan: MentionPlan, houses: Sequence[House]) -> bytes:
    assert plan.shown is not None
    rng = Random(f"{config.seed}/picture/{number}")
    return photograph(
        houses[plan.shown].arms, config.picture_size, damage=plan.damage, roughness=config.roughness, rng=rng
    )


def _entity_id(row: int) -> str:
    return f"H{row:05d}"


def _entity_record(row: int, house: House) -> dict[str, Any]:
    return {
        "id": row,
        "type": "entity",
        "entity_name": house.name,
        "attr": attributes(house.arms, house.facts),
        "qid": _entity_id(row),
        "image_list": [f"{_entity_id(row)}.jpg"] if house.has_image else [],
    }


def _mention_record(number: int, plan: MentionPlan, houses: Sequence[House]) -> dict[str, Any]:
    return {
        "id": f"m{number:05d}",
        "sentence": plan.sentence,
        "mentions": plan.word,
        "entities": houses[plan.gold].name,
        "imgPath": f"m{number:05d}.jpg" if plan.shown is not None else "",
        "answer": _entity_id(plan.gold),
        "kind": plan.kind,
    }


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
