"""DSMIP as a whole: what the gate's choice does to scores, its size, and what a part's weights file holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.collate import Collator, ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.images import PixelForm
from dsmip.data.records import Entity, Mention
from dsmip.data.table import Table
from dsmip.data.text import Template, mention_text
from dsmip.encoders.architecture import build_tokenizer
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.models.dsmip import Dsmip, DsmipMatcher
from dsmip.ops.gumbel import relaxed_choice, sample_gumbel
from dsmip.runs.load_config import parse_config
from dsmip.runs.weights import load_own_weights, own_weights, save_weights
from dsmip.training.batches import StreamSource
from dsmip.units.matcher import BatchGold
from tests.support.scoring.systems import features, seeded, whole, with_system
from tests.support.small_release import image_bytes

NUM_MENTIONS, NUM_ENTITIES = 5, 6


def prepared(matcher: DsmipMatcher, config: ExperimentConfig) -> tuple[Table, Table]:
    mentions, entities = features(config, NUM_MENTIONS, 2), features(config, NUM_ENTITIES, 3)
    return matcher.prepare_mentions(mentions), matcher.prepare_entities(entities)


@pytest.mark.parametrize("final", ["relu", "none"])
def test_ties_go_to_the_expert_listed_first(small_config: ExperimentConfig, final: str) -> None:
    """Logits that are all equal, or (relu) all negative: the same choice with and without gradients."""
    matcher = whole(small_config, final_activation=final)
    with torch.no_grad():
        matcher.gate.mention_logits.weight.zero_()
        matcher.gate.entity_logits.weight.zero_()
        matcher.gate.mention_logits.bias.copy_(torch.tensor([-3.0, -2.0, -1.0]))
    mentions, entities = prepared(matcher, small_config)
    first = 0 if final == "relu" else 2
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            scores = matcher.score(mentions, entities)
        assert scores.chosen_ME is not None
        assert scores.chosen_ME.tolist() == [[first] * NUM_ENTITIES] * NUM_MENTIONS
        torch.testing.assert_close(scores.total_ME, list(scores.parts.values())[first], atol=0, rtol=0)
    assert scores.tied_choice_ME is not None
    assert scores.tied_choice_ME.tolist() == [[final == "relu"] * NUM_ENTITIES] * NUM_MENTIONS


def test_one_expert_per_mention(small_config: ExperimentConfig) -> None:
    matcher = whole(small_config, choice="mention")
    with torch.no_grad():
        matcher.gate.mention_logits.bias.zero_()
        matcher.gate.mention_logits.weight.mul_(20)  # else one expert has them all
        mentions, entities = prepared(matcher, small_config)
        scores = matcher.score(mentions, entities)
    logits_MB = mentions.dense("gate.logits")
    assert scores.chosen_ME is not None
    assert scores.chosen_ME.shape == (NUM_MENTIONS, NUM_ENTITIES)
    assert torch.equal(scores.chosen_ME, logits_MB.argmax(dim=1)[:, None].expand(NUM_MENTIONS, NUM_ENTITIES))
    assert len(set(scores.chosen_ME[:, 0].tolist())) > 1
    parts_MEB = torch.stack(list(scores.parts.values()), dim=-1)
    assert torch.equal(scores.total_ME, parts_MEB.gather(-1, scores.chosen_ME[..., None])[..., 0])


@torch.no_grad()
def test_a_gate_that_says_nan_chooses_nobody(small_config: ExperimentConfig) -> None:
    """The largest of NaN logits would be some expert's, whose finite scores would be ranked."""
    matcher = whole(small_config)
    mentions, entities = prepared(matcher, small_config)
    entities.dense("gate.logits")[4] = torch.nan
    scores = matcher.score(mentions, entities)
    assert scores.broken_part(0, 4) == "gate"
    broken_ME = scores.total_ME.isnan()
    assert broken_ME[:, 4].all()
    assert int(broken_ME.sum()) == NUM_MENTIONS


@pytest.mark.parametrize("choice", ["pair", "mention"])
def test_training_scores_choose_with_noise_and_carry_the_relaxed_gradient(
    small_config: ExperimentConfig, choice: str
) -> None:
    matcher = whole(small_config, choice=choice, temperature=0.7)
    mentions, entities = prepared(matcher, small_config)
    logits_MB = mentions.dense("gate.logits").detach().requires_grad_()
    mentions = Table({**mentions.columns, "gate.logits": logits_MB})
    noise = sample_gumbel((NUM_MENTIONS, NUM_ENTITIES if choice == "pair" else 1, 3), torch.Generator().manual_seed(4))
    scores = matcher.score(mentions, entities, noise=noise)
    (found,) = torch.autograd.grad(scores.total_ME.sum(), logits_MB, retain_graph=True)

    def relaxed_total(logits: Tensor) -> Tensor:
        table = Table({"logits": logits})
        log_pi_MEB = matcher.gate.log_pi(table, entities.under("gate"))
        parts_MEB = torch.stack([part.detach() for part in scores.parts.values()], dim=-1)
        return (relaxed_choice(log_pi_MEB, noise, 0.7) * parts_MEB).sum()

    (expected,) = torch.autograd.grad(relaxed_total(logits_MB), logits_MB)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    log_pi_MEB = matcher.gate.log_pi(mentions.under("gate"), entities.under("gate"))
    chosen_ME = (log_pi_MEB + noise).argmax(-1).expand(NUM_MENTIONS, NUM_ENTITIES)
    assert scores.chosen_ME is not None
    assert torch.equal(scores.chosen_ME, chosen_ME)
    parts_MEB = torch.stack(list(scores.parts.values()), dim=-1)
    assert torch.equal(scores.total_ME, parts_MEB.gather(-1, chosen_ME[..., None])[..., 0])


def test_the_loss_draws_its_noise_from_the_global_seed(small_config: ExperimentConfig) -> None:
    """So that a resumed training, which seeds every step, draws the same."""
    matcher = whole(small_config, temperature=0.7)
    mentions, entities = features(small_config, NUM_MENTIONS, 2), features(small_config, NUM_ENTITIES, 3)
    gold = BatchGold(torch.arange(NUM_MENTIONS), torch.zeros(NUM_MENTIONS, NUM_ENTITIES, dtype=torch.bool))
    first, second, third = (seeded(seed, lambda: matcher(mentions, entities, gold)).item() for seed in (1, 1, 2))
    assert first == second
    assert first != third


def test_the_experts_in_use_come_in_their_order(small_config: ExperimentConfig) -> None:
    config = with_system(small_config, use=["multimodal", "text"])
    matcher = Dsmip.build_whole(config)
    assert list(matcher.score(*prepared(matcher, config)).parts) == ["multimodal", "text"]  # type: ignore[arg-type]
    assert Dsmip.choices(config.system) == ("multimodal", "text")
    assert Dsmip.feature_parts(config.system) == ("multimodal", "text", "gate")
    assert Dsmip.part_names(config.system) == ("text", "visual", "multimodal")


def num_trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_multimodal_expert_trains_as_many_parameters_as_the_paper_says() -> None:
    """7.6 M with ViT-B/32, prompts of length 2 in nine layers (built without memory for its weights)."""
    config = parse_config({"model": "dsmip", "backbone": {"architecture": "ViT-B-32"}})
    with torch.device("meta"):
        expert = Dsmip.build_part("multimodal", config, with_encoder=True)
    assert num_trained(expert) == pytest.approx(7.6e6, rel=0.01)
    prompts = 18 * (2 * 512 + 512 * 768 + 768)
    assert expert.encoder is not None
    assert num_trained(expert.encoder) == prompts
    assert sum(p.numel() for p in expert.encoder.backbone.parameters()) == pytest.approx(151.3e6, rel=0.01)


def part(config: ExperimentConfig, name: str, *, with_encoder: bool = True, seed: int = 1) -> Any:
    return seeded(seed, lambda: Dsmip.build_part(name, config, with_encoder=with_encoder))


def tuned(config: ExperimentConfig, name: str, **changes: Any) -> ExperimentConfig:
    return with_system(config, experts={name: changes})


LONG = [Mention("m0", "word", "sentence " * 100, "Q1", 0), Mention("m1", "word", "short", "Q1", 0)]


def encoded(config: ExperimentConfig, name: str) -> Table:
    """Features of a text that is too long and of a short one, as a job makes them."""
    architecture = config.backbone.architecture
    items = Collator(build_tokenizer(architecture), Dsmip.item_format(config.system, name), 16).mentions(LONG)
    with torch.no_grad():
        table: Table = part(config, name).encode_mentions(items)
    return table


@pytest.mark.parametrize("name", ["text", "multimodal"])
def test_unmasked_padding_takes_all_places_of_the_context(small_config: ExperimentConfig, name: str) -> None:
    """And changes no real token: padding is seen by the text unit only."""
    masked = encoded(small_config, name).ragged("text_tokens")
    every = encoded(with_system(small_config, mask_padding=False), name).ragged("text_tokens")
    assert every.lengths.tolist() == [77, 77]
    assert masked.lengths[0] == 77 > masked.lengths[1]
    for row, length in enumerate(masked.lengths.tolist()):
        one = slice(row, row + 1)
        torch.testing.assert_close(every.rows(one).padded()[0][:, :length], masked.rows(one).padded()[0])


@pytest.mark.parametrize("none", [{"prompt_length": 0}, {"prompt_depth": 0}])
def test_without_prompts_a_long_text_has_all_of_clips_places(
    small_config: ExperimentConfig, none: dict[str, int]
) -> None:
    table = encoded(with_system(small_config, experts={"multimodal": none}), "multimodal")
    architecture = small_config.backbone.architecture
    tokens = build_tokenizer(architecture)([mention_text(mention, Template()) for mention in LONG])
    assert tokens.ids.shape == (2, 77)
    with torch.no_grad():
        plain = Backbone.build(architecture, None).encode_text(*tokens)
    assert torch.equal(table.dense("text_global"), plain.pooled)
    assert not torch.equal(encoded(small_config, "multimodal").dense("text_global"), plain.pooled)


def test_a_frozen_tower_is_not_saved(small_config: ExperimentConfig) -> None:
    names = own_weights(part(small_config, "multimodal")).keys()
    assert not any(".backbone." in name for name in names)
    assert {"encoder.mention_prompts.tables_Jrt", "encoder.entity_prompts.couplings.1.bias"} <= names
    assert "scorer.units.cross.context_layer_norm.weight" in names  # published, never trained, but no tower's


def test_a_trained_tower_is_saved(small_config: ExperimentConfig) -> None:
    matcher = part(tuned(small_config, "text", tune="full"), "text")
    saved = {name for name in own_weights(matcher) if ".backbone." in name}
    assert saved == {n for n, p in matcher.named_parameters() if p.requires_grad and ".backbone." in n}
    assert any("token_embedding" in name for name in saved)
    assert not any("visual" in name for name in saved)


def test_weights_are_loaded_with_or_without_towers(small_config: ExperimentConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    trained = part(small_config, "multimodal", seed=5)
    save_weights(path, own_weights(trained))
    for with_encoder in (True, False):
        again = part(small_config, "multimodal", with_encoder=with_encoder)
        load_own_weights(again, path)
        for name, tensor in own_weights(again).items():
            assert torch.equal(tensor, trained.state_dict()[name])


def test_weights_of_another_form_are_refused(small_config: ExperimentConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, own_weights(part(small_config, "text")))
    with pytest.raises(UserError, match="another configuration"):
        load_own_weights(part(small_config, "visual"), path)
    with pytest.raises(UserError, match=r"scorer\.units.*shape.*8.*9"):
        load_own_weights(part(with_system(small_config, width=9), "text"), path)


FIVE = ("text_image", "text", "visual", "multimodal", "image_text")


def with_five(config: ExperimentConfig, **gate: Any) -> ExperimentConfig:
    return with_system(config, experts={"text_image": {}, "image_text": {}}, use=list(FIVE), gate=gate)


@pytest.mark.parametrize("choice", ["pair", "mention"])
def test_the_gate_chooses_from_five_experts(small_config: ExperimentConfig, choice: str) -> None:
    config = with_five(small_config, choice=choice)
    matcher = seeded(1, lambda: Dsmip.build_whole(config)).eval()
    with torch.no_grad():
        matcher.gate.mention_logits.weight.mul_(20)  # else one expert has them all
        scores = matcher.score(*prepared(matcher, config))
        parts = matcher.part_scores(*prepared(matcher, config))
    assert tuple(parts) == FIVE == Dsmip.choices(config.system)
    assert scores.chosen_ME is not None
    assert len(scores.chosen_ME.unique()) > 1
    parts_MEB = torch.stack(list(parts.values()), dim=-1)
    torch.testing.assert_close(scores.total_ME, parts_MEB.gather(-1, scores.chosen_ME[..., None])[..., 0])
    assert scores.token_pairs_M2 is not None
    assert scores.token_pairs_M2[:, 1].tolist() == [4 * NUM_ENTITIES] * NUM_MENTIONS  # all but the visual one


def test_a_cross_modal_expert_reads_one_modality_of_each_side(small_config: ExperimentConfig) -> None:
    """What it does not read is not even decoded."""
    config = with_five(small_config)
    mention = Mention("m0", "word", "a sentence", "Q1", 0, image=image_bytes((16, 16), "red"))
    entity = Entity(0, "Q1", "name", "attributes", (image_bytes((16, 16), "blue"),))
    for name, texts_of, images_of in (("text_image", 0, 1), ("image_text", 1, 0)):
        form = Dsmip.item_format(config.system, name)
        collator = Collator(build_tokenizer(config.backbone.architecture), form, 16)
        batches = collator.mentions([mention]), collator.entities([entity])
        assert [int(batch.token_mask.sum()) > 2 for batch in batches] == [texts_of == 0, texts_of == 1]
        assert [bool(batch.has_image.any()) for batch in batches] == [images_of == 0, images_of == 1]
        expert = part(config, name)
        tables = expert.encode_mentions(batches[0]), expert.encode_entities(batches[1])
        kinds = [{column.partition("_")[0] for column in table.columns} for table in tables]
        assert kinds[texts_of] == {"text"}
        assert kinds[images_of] == {"image"}


def test_an_entity_as_a_mention_of_itself_is_read_as_mentions_are(
    small_config: ExperimentConfig, small_data: Dataset
) -> None:
    collator = Collator(
        build_tokenizer(small_config.backbone.architecture),
        Dsmip.item_format(with_five(small_config).system, "text_image"),
        16,
    )
    train = TrainConfig(batch_size=8, self_mentions=6)
    step = next(iter(StreamSource(small_data, "train", collator, train, 0).steps(0)))
    assert isinstance(step.mentions, ItemBatch)
    assert isinstance(step.entities, ItemBatch)
    own = step.mentions.rows(len(step.mentions) - 6, len(step.mentions))
    assert bool((own.token_mask.sum(dim=1) > 2).all())
    assert not bool(own.has_image.any())
    assert bool(step.entities.has_image.any())


def test_all_parts_see_pictures_alike(small_config: ExperimentConfig) -> None:
    config = with_system(with_five(small_config), pixels={"resize": "squash"})
    for name in Dsmip.feature_parts(config.system):
        assert Dsmip.item_format(config.system, name).pixels == PixelForm(resize="squash")


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ({"use": ["text"]}, "two to five different experts"),
        ({"use": ["text", "text_image"]}, r"no expert named text_image under experts \(experts.text_image: {}\)"),
        (
            {"experts": {"text": {}, "text_image": {"prompt_length": 2}}, "use": ["text", "text_image"]},
            "text_image: only the multimodal expert",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(system: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_config({"model": "dsmip", "backbone": {"architecture": "tiny"}, "system": system})
