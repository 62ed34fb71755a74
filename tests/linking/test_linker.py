"""Linkers: scores are those of an evaluation for every system, inputs of every kind, order, errors, threads."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dsmip
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.jsonl import JsonlRelease
from dsmip.calibration.calibration import BestScores, Calibration
from dsmip.data.dataset import Dataset
from dsmip.data.table import Table
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedModel, plan_index
from dsmip.evaluation.stored.layout import CALIBRATED_ON, CALIBRATION, RANKS, evaluation_name
from dsmip.linking import search
from dsmip.linking.linker import Linker
from dsmip.models import systems
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from dsmip.units.expert import Expert
from dsmip.units.matcher import Scores
from tests.support.scoring.linked_runs import finished_run, small_system
from tests.support.small_release import image_bytes

EXPERTS = ("text", "visual", "multimodal")
QUICK = ("dsmip", "blink")  # the others are slow tests
TOLERANCE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}


def evaluated(run: Run, model: str | None = None) -> list[dict[str, Any]]:
    table = pq.read_table(dsmip.evaluate(run.folder, "test", model).folder / RANKS)
    return table.to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in systems()]
)
def test_scores_are_those_of_an_evaluation(
    name: str, small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run", small_system(name, narrow_backbone), small_data)
    expected = evaluated(run)
    linker = dsmip.load(run.folder)
    found = list(linker.link_many(small_data.mentions("test"), top=20))
    assert len(found) == len(expected) == small_data.num_mentions("test")
    for links, row in zip(found, expected, strict=True):
        assert [link.entity_id for link in links] == row["top"]
        assert [link.score for link in links] == pytest.approx(row["top_scores"], **TOLERANCE)
        assert [link.expert for link in links] == row.get("top_experts", [None] * len(row["top"]))
    for mention, row in zip(small_data.mentions("test"), expected, strict=True):  # by hand, one at a time
        links = linker.link(mention.word, mention.sentence, mention.image, top=3, desc=mention.desc)
        assert [link.score for link in links] == pytest.approx(row["top_scores"][:3], **TOLERANCE)
        assert links.best == links[0]
        assert links.best.entity_id == row["top"][0]
        assert (links.is_nil, links.best.confidence) == (False, None)


@pytest.mark.slow
def test_features_in_half_precision_and_a_single_part(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run", small_system("dsmip", narrow_backbone, cache_dtype="float16"), small_data)
    for model in (None, "multimodal"):
        rows = evaluated(run, model)
        linker = dsmip.load(run.folder, model=model)
        for links, row in zip(linker.link_many(small_data.mentions("test"), top=20), rows, strict=True):
            assert [link.score for link in links] == pytest.approx(row["top_scores"], **TOLERANCE)


_ALONE = [("dsmip", {})]
_IN_ALL_WAYS: list[tuple[str, Any]] = [("dsmip", {}), ("dsmip", {"candidates": 11}), ("mean", {}), ("product", {})]


@pytest.mark.parametrize(
    ("scoring", "cases"), [("mixture", _ALONE), pytest.param("product", _IN_ALL_WAYS, marks=pytest.mark.slow)]
)
def test_fused_experts_are_asked_about_all_entities_for_every_mention(
    scoring: str, cases: list[tuple[str, Any]], small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    config = changed(small_system("dsmip", narrow_backbone), {"system": {"gate": {"preset": "confidence"}}})
    run = finished_run(tmp_path / "run", changed(config, {"system": {"gate": {"scoring": scoring}}}), small_data)
    run.save_part("dsmip", run.load_whole(), {"fusion": {"scale": dict.fromkeys(EXPERTS, 0.5)}})
    for model, options in cases:
        rows = evaluated(run, model)
        linker = dsmip.load(run.folder, model=model)
        for links, row in zip(linker.link_many(small_data.mentions("test"), top=5, **options), rows, strict=True):
            assert [link.entity_id for link in links] == row["top"][:5]
            assert [link.score for link in links] == pytest.approx(row["top_scores"][:5], **TOLERANCE)


@pytest.fixture(scope="module")
def fused(small_data: Dataset, narrow_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Its gate sees how sure its experts are."""
    config = changed(small_system("dsmip", narrow_backbone), {"system": {"gate": {"preset": "confidence"}}})
    return finished_run(tmp_path_factory.mktemp("fused") / "run", config, small_data)


@pytest.mark.parametrize("most_kept", [search.MOST_KEPT, 0])
@pytest.mark.parametrize("candidates", [None, 4])
def test_fused_experts_score_a_pair_once(
    fused: Run, most_kept: int, candidates: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for their scores; close pairs and candidates are scored exactly, in float64."""
    linker, scored = dsmip.load(fused.folder), list[int]()
    expected = linker.link("red", sentence="a red thing", candidates=candidates)
    score = Expert.score

    def counted(self: Expert, mentions: Table, entities: Table, **how: Any) -> Scores:
        found = score(self, mentions, entities, **how)
        if found.total_ME.dtype == torch.float32:
            scored.append(found.total_ME.numel())
        return found

    monkeypatch.setattr(Expert, "score", counted)
    monkeypatch.setattr(search, "MOST_KEPT", most_kept)
    links = linker.link("red", sentence="a red thing", candidates=candidates)
    assert [(link.entity_id, link.score) for link in links] == [(link.entity_id, link.score) for link in expected]
    once = len(EXPERTS) * len(linker)
    assert sum(scored) == (once if candidates or most_kept else 2 * once)


@pytest.fixture(scope="module")
def linker(run: Run) -> Linker:
    return dsmip.load(run.folder)


def test_the_index_is_the_one_of_an_evaluation(run: Run, linker: Linker) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.folder.glob("index/*/*")}

    before = files()
    assert before
    assert len(linker) == run.dataset.num_entities
    dsmip.load(run.folder)
    dsmip.evaluate(run.folder, "test")
    assert before.items() <= files().items()


def test_pictures_of_every_kind_are_one(run: Run, tmp_path: Path) -> None:
    linker = dsmip.load(run.folder, model="visual")
    content = image_bytes((40, 30), "green", "PNG")
    (tmp_path / "green.png").write_bytes(content)
    image = Image.new("RGB", (40, 30), "green")
    array = np.asarray(image)
    scores = [
        [link.score for link in linker.link("green", "a green thing", each)]
        for each in (str(tmp_path / "green.png"), tmp_path / "green.png", content, image, array)
    ]
    assert all(each == scores[0] for each in scores)
    assert [link.score for link in linker.link("green", "a green thing")] != scores[0]


def test_a_picture_is_prepared_as_that_of_a_release(linker: Linker, run: Run, tmp_path: Path) -> None:
    """A large, turned or transparent one is linked as the mention of a data set that has it."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 500, 4), dtype=np.uint8)
    Image.fromarray(noise).resize((700, 600)).save(tmp_path / "photo.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "entities.jsonl").write_text('{"entity_id": "Q1", "name": "one"}\n')
    rows = [
        f'{{"mention_id": "{split}", "word": " word\\u0007 ", "sentence": "a word", "entity_id": "Q1", '
        f'"image": "{image}", "split": "{split}"}}'
        for split, image in (("train", "photo.png"), ("validation", "turned.jpg"), ("test", "photo.png"))
    ]
    (tmp_path / "mentions.jsonl").write_text("\n".join(rows) + "\n")
    prepare(JsonlRelease(tmp_path), tmp_path / "data", DatasetOptions(name="own", images=run.dataset.manifest.image))
    dataset = Dataset.open(tmp_path / "data")
    for split, name in (("train", "photo.png"), ("validation", "turned.jpg")):
        (record,) = dataset.mentions(split)
        found = linker.link(" word\a ", "a word", tmp_path / name)
        assert (found.mention.word, found.mention.image) == (record.word, record.image)


def test_many_mentions_keep_their_order_in_any_form(linker: Linker) -> None:
    rows = [{"word": f"w{number}", "sentence": f"a thing {number}", "mention_id": number} for number in range(9)]
    expected = [links.best for links in linker.link_many(rows)]
    table = pa.Table.from_pylist([{**row, "mention_id": str(row["mention_id"])} for row in rows])
    for form in (iter(rows), table, table.to_batches(max_chunksize=2), table.to_reader()):
        found = list(linker.link_many(form, batch_size=4))
        assert [links.mention.word for links in found] == [row["word"] for row in rows]
        assert [links.mention.mention_id for links in found] == [str(row["mention_id"]) for row in rows]
        for links, best in zip(found, expected, strict=True):
            assert best
            assert links[0].entity_id == best.entity_id
            assert links[0].score == pytest.approx(best.score, **TOLERANCE)


def test_a_pandas_frame(linker: Linker) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"word": ["red", "blue"], "sentence": ["a red thing", None], "image": [None, float("nan")]}
    )
    assert [links.mention.sentence for links in linker.link_many(frame)] == ["a red thing", ""]


def test_a_stream_is_read_no_further_than_needed(linker: Linker) -> None:
    read = []

    def endless() -> Iterator[dict[str, str]]:
        while True:
            read.append(1)
            yield {"word": "red", "sentence": "a red thing"}

    found = linker.link_many(endless(), batch_size=2)
    next(found)
    assert len(read) == 2
    assert list(linker.link_many([])) == []


BAD: list[tuple[Any, str]] = [
    ({"word": " ", "sentence": "s"}, "word: empty"),
    ({"sentence": "s"}, "word: empty"),
    ({"word": 3}, "word: a value of type int is no text"),
    ({"word": "\ud800"}, "word: broken text"),
    ({"word": "w", "image": b"no picture"}, "image: picture unreadable"),
    ({"word": "w", "image": "nowhere.jpg"}, "image nowhere.jpg: no such file"),
    ({"word": "w", "image": "https://host/x.jpg"}, "image https://host/x.jpg: no address is fetched"),
    ({"word": "w", "image": np.zeros((2, 2))}, r"image: an array float64 \[2, 2\]"),
    ({"word": "w", "image": 7}, "image: a value of type int"),
    ("word", "a mention is a dict"),
]


@pytest.mark.parametrize(("given", "reason"), BAD)
def test_a_bad_mention_is_said_or_reported(linker: Linker, given: Any, reason: str) -> None:
    good = {"word": "red", "sentence": "a red thing"}
    with pytest.raises(dsmip.UserError, match=f"mention 1: .*{reason}"):
        list(linker.link_many([good, given, good]))
    found = list(linker.link_many([good, given, good], on_error="report"))
    assert [links.reason is None for links in found] == [True, False, True]
    assert (len(found[1]), found[1].best) == (0, None)
    assert found[0].links == found[2].links
    if isinstance(given, dict):
        with pytest.raises(dsmip.UserError, match=f"^{reason}"):
            linker.link(given.get("word", ""), given.get("sentence", ""), given.get("image"))


def test_a_bomb_and_a_long_sentence(linker: Linker, tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(dsmip.UserError, match=r"bomb.png: picture too large"):
        linker.link("red", image=tmp_path / "bomb.png")
    assert linker.link("red", "red " * 2_500_000).best is not None


@pytest.mark.parametrize("options", [{"top": 0}, {"batch_size": 0}, {"candidates": 0}])
def test_options_out_of_range(linker: Linker, options: dict[str, int]) -> None:
    with pytest.raises(dsmip.UserError, match="give at least 1"):
        linker.link_many([], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["dsmip", "text"])
def test_candidates_have_their_exact_scores(run: Run, model: str) -> None:
    linker = dsmip.load(run.folder, model=model)
    mentions = list(run.dataset.mentions("test"))
    exact = list(linker.link_many(mentions, top=20))
    for links, among in zip(exact, linker.link_many(mentions, top=20, candidates=len(linker)), strict=True):
        assert among.links == links.links  # all are candidates
    few = list(linker.link_many(mentions, top=2, candidates=4))
    for links, among in zip(exact, few, strict=True):
        assert len(among) == 2
        assert {*among} <= {*links}
        assert among[0].score >= among[1].score
    assert any(among.best == links.best for links, among in zip(exact, few, strict=True))


def test_threads_get_what_one_gets_alone(linker: Linker) -> None:
    words = [f"word {number}" for number in range(8)]
    alone = {word: linker.link(word, f"a {word}").links for word in words}
    found: dict[str, Any] = {}
    start = threading.Barrier(len(words))

    def link(word: str) -> None:
        start.wait()
        found[word] = linker.link(word, f"a {word}").links

    threads = [threading.Thread(target=link, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_cards_are_escaped(linker: Linker) -> None:
    links = linker.link("<script>alert(1)</script>", 'a "quoted" & <b>bold</b> one', image_bytes((20, 20)))
    page = links.html()
    assert getattr(links, "_repr_html_")() == page  # noqa: B009  (what a notebook calls)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;bold" in page
    assert page.count("data:image/jpeg;base64,") >= 2  # the mention's and at least one entity's
    assert links[0].name in page
    assert links[0].expert in page


@pytest.mark.parametrize("is_of_this_index", [True, False])
def test_a_calibrated_model_says_how_sure_it_is(run: Run, *, is_of_this_index: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 9 * torch.rand(40, 11, generator=generator, dtype=torch.float64).sort(descending=True).values
    is_gold = torch.rand(40, 11, generator=generator).argsort(dim=1) == 0
    index = plan_index(OpenedModel(run)).name if is_of_this_index else "another"
    made = Calibration.fit("dsmip", index, EXPERTS, BestScores(scores, torch.zeros(40, 11).long()), is_gold)
    name = f"{evaluation_name(CALIBRATED_ON, 'dsmip')}/{CALIBRATION}"
    run.storage.write_json(name, made.model_dump(mode="json"))
    linker = dsmip.load(run.folder)
    run.storage.delete(name)
    if not is_of_this_index:
        assert linker.calibration is None
        with pytest.raises(UserError, match=r"min_confidence: dsmip of .* is not calibrated"):
            linker.link("red", min_confidence=0.5)
        return
    assert linker.calibration == made
    mentions = list(run.dataset.mentions("test"))
    found = list(linker.link_many(mentions, top=2))
    best = linker.search.best(linker.search.informed(linker.prepared(mentions)), made.num_scores)
    assert best.chosen_Mk is not None
    right_M, known_M = made.probabilities(BestScores(best.score_Mk, best.chosen_Mk))
    assert [links[0].confidence for links in found] == right_M.tolist()
    assert [links.known for links in found] == known_M.tolist()
    assert [links.is_nil for links in found] == (known_M < made.min_known).tolist()
    assert [links.best is None for links in found] == (known_M < made.min_known).tolist()
    assert {len(links) for links in found} == {2}
    assert found[0][1].confidence is None
    assert linker.link("red", min_confidence=1.0).is_nil
    with pytest.raises(UserError, match=r"min_confidence: 1.1 is no probability"):
        linker.link("red", min_confidence=1.1)
    assert not linker.link("red", min_confidence=0.0).is_nil


def test_a_model_that_scores_nan_is_one_line(small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", small_system("blink", narrow_backbone), small_data)
    reranker = run.load_reranker("crossencoder")
    torch.nn.init.constant_(reranker.get_parameter("out.bias"), torch.nan)
    run.save_part("crossencoder", reranker, {})
    with pytest.raises(dsmip.UserError, match=r"blink of .* scores 'red' and entity Q\d+ as NaN .* \(re-ranker\)"):
        dsmip.load(run.folder).link("red")


def test_a_model_whose_vectors_are_nan_has_no_candidates(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run", small_system("mimic", narrow_backbone), small_data)
    matcher = run.load_part("mimic", with_encoder=True)
    for weight in matcher.parameters():
        torch.nn.init.constant_(weight, torch.nan)
    run.save_part("mimic", matcher, {})
    with pytest.raises(dsmip.UserError, match="vector of entity row 0 is NaN or infinite, so that no candidates"):
        dsmip.load(run.folder).link("red", candidates=2)


def test_what_cannot_be_loaded(run: Run, tmp_path: Path) -> None:
    with pytest.raises(dsmip.UserError, match="neither a run nor a bundle"):
        dsmip.load(tmp_path)
    with pytest.raises(dsmip.UserError, match="unknown model 'nothing'"):
        dsmip.load(run.folder, model="nothing")
    with pytest.raises(dsmip.UserError, match="this machine has"):
        dsmip.load(run.folder, device="cuda:99")
    with pytest.raises(dsmip.UserError, match="is no device"):
        dsmip.load(run.folder, device="gpu")


def test_data_that_has_moved(small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    copied = tmp_path / "data"
    copied.mkdir()
    for path in small_data.folder.rglob("*"):
        target = copied / path.relative_to(small_data.folder)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    run = finished_run(tmp_path / "run", small_system("clip", narrow_backbone), Dataset.open(copied))
    copied.rename(tmp_path / "moved")
    with pytest.raises(dsmip.UserError, match="has moved, say where it is by --data"):
        dsmip.load(run.folder)
    assert len(dsmip.load(run.folder, data=tmp_path / "moved").link("red", top=4)) == 4
