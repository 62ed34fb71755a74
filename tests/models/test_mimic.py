"""MIMIC against its published scores, parameter names and text tower, and what is said of weights that do not fit."""

import json

import pytest
import torch
from open_clip import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from dsmip.config import BackboneConfig, ExperimentConfig, OptimizerConfig
from dsmip.data.collate import Collator, ItemBatch
from dsmip.data.images import PixelForm
from dsmip.data.records import Entity, Mention
from dsmip.encoders.architecture import build_tokenizer, resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.formats.hugging_face_clip import open_clip_names
from dsmip.encoders.weights import load_weights
from dsmip.errors import UserError
from dsmip.models.mimic import Mimic, MimicMatcher
from dsmip.runs.load_config import load_config, parse_config
from dsmip.units.matcher import BatchGold
from dsmip.units.shared_clip import SharedClipEncoder
from dsmip.units.unit_scorer import UnitScorer
from tests.support.paths import MIMIC_UNITS
from tests.support.scoring.published import SIZES, WIDTH, published_features, published_weights, stored_values
from tests.support.tokens import mask_to_end

START, END = 49406, 49407
NUM_TOKENS = 40
LENGTHS = (4, 40, 12, 3)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return stored_values(MIMIC_UNITS)


@pytest.fixture(scope="module")
def published(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return published_weights(golden)


def golden_matcher() -> MimicMatcher:
    return MimicMatcher(UnitScorer(("text", "image"), SIZES, WIDTH, mask_padding=False))


def test_published_weights_give_the_published_scores(golden: dict[str, Tensor], published: dict[str, Tensor]) -> None:
    matcher = golden_matcher()
    matcher.load_published_state_dict(published)
    mentions = matcher.prepare_mentions(published_features(golden, "mention"))
    entities = matcher.prepare_entities(published_features(golden, "entity"))
    scores = matcher.score(mentions, entities)
    for name, value in {**scores.parts, "mean": scores.total_ME}.items():
        torch.testing.assert_close(value, golden[f"scores/{name}"], atol=1e-4, rtol=1e-5)


def test_loss_is_the_sum_of_four_contrastive_losses(golden: dict[str, Tensor], published: dict[str, Tensor]) -> None:
    matcher = golden_matcher()
    matcher.load_published_state_dict(published)
    column_M = torch.tensor([3, 0, 7, 2, 10])
    excluded = torch.zeros(5, 11, dtype=torch.bool)
    excluded[1, 5] = excluded[4, 2] = True
    loss = matcher(
        published_features(golden, "mention"), published_features(golden, "entity"), BatchGold(column_M, excluded)
    )
    expected = torch.zeros(())
    for name in ("mean", "text", "image", "cross"):
        for mention, column in enumerate(column_M.tolist()):
            row = golden[f"scores/{name}"][mention]
            rivals = [e for e in range(11) if not excluded[mention, e]]
            expected += torch.logsumexp(row[rivals], dim=0) - row[column]
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matcher.tglu.fc_query.bias": None}, r"matcher\.tglu\.fc_query\.bias is missing$"),
        ({"encoder.image_cls_fc.weight": None}, r"encoder\.image_cls_fc\.weight is missing$"),
        ({"matcher.tglu.fc_qeury.bias": torch.zeros(24)}, r"matcher\.tglu\.fc_qeury\.bias is not part"),
        ({"matcher.image_cls_fc.bias": torch.zeros(24)}, r"matcher\.image_cls_fc\.bias is not part"),
        ({"matcher.cmfu.gate_fc.weight": torch.zeros(1, 96)}, r"gate_fc\.weight has shape \(1, 96\).* \(1, 24\)$"),
    ],
)
def test_wrong_published_weights_are_named_and_change_nothing(
    published: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    matcher = golden_matcher()
    before = {name: tensor.clone() for name, tensor in matcher.state_dict().items()}
    state = {name: tensor for name, tensor in {**published, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        matcher.load_published_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in matcher.state_dict().items())


@pytest.fixture(scope="module")
def hugging_face() -> CLIPModel:
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    quick_gelu = {"hidden_act": "quick_gelu"}
    config = CLIPConfig(
        text_config={**text, **quick_gelu, "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 24},
        vision_config={**vision, **quick_gelu, "image_size": 32, "patch_size": 8, "projection_dim": 24},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model: CLIPModel = CLIPModel(config)
        model.train(False)
        for parameter in model.parameters():  # norms and biases start at 1 and 0, which would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """The open_clip network of the same sizes."""
    architecture = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
    }
    path = tmp_path_factory.mktemp("backbone") / "small.json"
    path.write_text(json.dumps(architecture))
    return parse_config({"model": "mimic", "backbone": {"architecture": str(path)}, "system": {"width": 16}})


@pytest.fixture(scope="module")
def released(config: ExperimentConfig, hugging_face: CLIPModel) -> dict[str, Tensor]:
    """A checkpoint as it was released: units, projections, and the CLIPModel with its position numbers."""
    units = Mimic.build_part("mimic", config, with_encoder=False).scorer
    names = {"units.text.": "matcher.tglu.", "units.image.": "matcher.vdlu.", "units.cross.": "matcher.cmfu."}
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(6)
    for name, tensor in units.state_dict().items():
        start = next((start for start in names if name.startswith(start)), None)
        _, _, leaf = name.partition(".")
        projection = leaf.startswith(("image_cls_fc", "image_tokens_fc"))
        unnamed = f"encoder.{leaf}" if projection else f"matcher.{leaf}"
        published_name = unnamed if start is None else names[start] + name.removeprefix(start)
        state[published_name] = torch.randn(tensor.shape, generator=generator)
    state |= {f"encoder.clip.{name}": tensor.clone() for name, tensor in hugging_face.state_dict().items()}
    state["encoder.clip.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["encoder.clip.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    return state


@pytest.fixture(scope="module")
def matcher(config: ExperimentConfig, released: dict[str, Tensor]) -> MimicMatcher:
    matcher = Mimic.build_part("mimic", config, with_encoder=True)
    matcher.load_published_state_dict(released)
    return matcher.eval()


@pytest.fixture(scope="module")
def items() -> ItemBatch:
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.zeros(len(LENGTHS), NUM_TOKENS, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        token_ids[row, :length] = torch.randint(1, 49000, (length,), generator=generator)
        token_ids[row, 0], token_ids[row, length - 1] = START, END
    images = torch.randint(0, 256, (len(LENGTHS), 3, 32, 32), generator=generator).to(torch.uint8)
    has_image = torch.tensor([True, True, False, True])
    images[~has_image] = 0
    return ItemBatch(token_ids, mask_to_end(token_ids), images, has_image)


def as_published(items: ItemBatch) -> tuple[Tensor, Tensor]:
    """Token ids padded with end-of-text to 40 places, and the attention mask."""
    attention_mask = torch.zeros(len(items), NUM_TOKENS, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        attention_mask[row, :length] = 1
    return items.token_ids.where(attention_mask.bool(), END), attention_mask


def towers(matcher: MimicMatcher) -> Backbone:
    assert matcher.encoder is not None
    return matcher.encoder.backbone


@torch.no_grad()
def test_features_equal_hugging_face_at_every_place(
    hugging_face: CLIPModel, matcher: MimicMatcher, items: ItemBatch
) -> None:
    input_ids, attention_mask = as_published(items)
    pixels = towers(matcher).normalise(items.images, items.has_image)
    expected = hugging_face(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixels)
    features = matcher.encode_mentions(items)
    tokens, mask = features.ragged("text_tokens").padded()
    assert mask.all()
    assert tokens.shape == (len(LENGTHS), NUM_TOKENS, 32)
    torch.testing.assert_close(tokens, expected.text_model_output.last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.dense("text_global"), expected.text_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features.dense("image_global"), expected.image_embeds, atol=1e-5, rtol=1e-4)
    patches, _ = features.ragged("image_tokens").padded()
    torch.testing.assert_close(patches, expected.vision_model_output.last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_places_see_no_padding(hugging_face: CLIPModel, matcher: MimicMatcher, items: ItemBatch) -> None:
    """The test above would not notice a tower without the mask if padding did not matter: it does."""
    input_ids, attention_mask = as_published(items)
    hidden = towers(matcher).encode_text(input_ids, attention_mask.bool(), hide_padding=True).tokens
    seen = towers(matcher).encode_text(input_ids, attention_mask.bool()).tokens
    real = attention_mask.bool()
    torch.testing.assert_close(hidden[real], seen[real])
    last = NUM_TOKENS - 1
    assert (hidden[0, last] - seen[0, last]).abs().max() > 0.01


def test_training_towers_give_the_same_features(matcher: MimicMatcher, items: ItemBatch) -> None:
    """With gradients (another attention kernel) and after `train()`, and the gradient reaches both towers."""
    with torch.no_grad():
        expected = matcher.encode_mentions(items)
    matcher.train()
    features = matcher.encode_mentions(items)
    matcher.eval()
    torch.testing.assert_close(
        features.ragged("text_tokens").values, expected.ragged("text_tokens").values, atol=1e-4, rtol=1e-4
    )
    loss = features.dense("text_global")[:, 0].sum() + features.ragged("image_tokens").values.square().sum()
    clip = towers(matcher).clip
    inputs = [clip.get_parameter(name) for name in ("token_embedding.weight", "visual.conv1.weight")]
    gradients = torch.autograd.grad(loss, inputs)
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in gradients)


def test_masked_padding_keeps_real_tokens_only(matcher: MimicMatcher, items: ItemBatch) -> None:
    encoder = matcher.encoder
    assert encoder is not None
    full = encoder(items).ragged("text_tokens")
    encoder.mask_padding = True
    own = encoder(items).ragged("text_tokens")
    encoder.mask_padding = False
    assert own.lengths.tolist() == list(LENGTHS)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(own.rows(slice(row, row + 1)).padded()[0], full.padded()[0][row : row + 1, :length])


def test_published_checkpoint_fills_every_parameter(matcher: MimicMatcher, released: dict[str, Tensor]) -> None:
    for name, published_name in (
        ("picture_norm.image_cls_fc.bias", "encoder.image_cls_fc.bias"),
        ("units.image.dual_men2ent.gate_fc.bias", "matcher.vdlu.dual_men2ent.gate_fc.bias"),
    ):
        assert torch.equal(matcher.scorer.get_parameter(name), released[published_name])
    loaded = sum(tensor.numel() for name, tensor in released.items() if not name.endswith("position_ids"))
    assert sum(tensor.numel() for tensor in matcher.state_dict().values()) == loaded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "text_model.encoder.layers.1.self_attn.k_proj.bias",
            r"self_attn\.k_proj for .*resblocks\.1\.attn\.in_proj_bias",
        ),
        ("visual_projection.weight", r"visual\.proj is missing"),
        ("vision_model.post_layernorm.bias", r"visual\.ln_post\.bias is missing"),
    ],
)
def test_missing_tower_weights_are_named(
    hugging_face: CLIPModel, config: ExperimentConfig, name: str, message: str
) -> None:
    backbone = Backbone.build(config.backbone.architecture, None)
    state = {key: tensor for key, tensor in hugging_face.state_dict().items() if key != name}
    with pytest.raises(UserError, match=message):
        load_weights(backbone.clip, open_clip_names(state), "test")


def test_unknown_tower_weights_are_named() -> None:
    for name in ("text_model.encoder.layers.0.mlp.fc3.weight", "classifier.weight", "encoder.layers.0.mlp.fc1.bias"):
        with pytest.raises(UserError, match=f"{name} is not a tensor of a Hugging Face CLIPModel"):
            open_clip_names({name: torch.zeros(1)})


def test_texts_are_written_and_cut_as_published(config: ExperimentConfig) -> None:
    collator = Collator(build_tokenizer(config.backbone.architecture), Mimic.item_format(config.system, "mimic"), 32)
    short = collator.entities([Entity(0, "Q1", "Otto", "Sex: male.")]).token_ids
    assert short.shape == (1, NUM_TOKENS)
    words = SimpleTokenizer().decode(short[0, 1 : int(short[0].argmax())].tolist()).split()
    assert words == ["otto", "[", "sep", "]", "sex", ":", "male", "."]
    long = collator.mentions([Mention("m", "Otto", "word " * 100, "Q1", 0)]).token_ids
    assert long.shape == (1, NUM_TOKENS)
    assert (int(long[0, 0]), int(long[0, -1])) == (START, END)


def test_too_many_tokens_are_refused(config: ExperimentConfig, matcher: MimicMatcher, items: ItemBatch) -> None:
    token_ids = torch.cat([items.token_ids[:, :1], items.token_ids], dim=1)
    with pytest.raises(ValueError, match="more than 40 tokens"):
        matcher.encode_mentions(ItemBatch(token_ids, mask_to_end(token_ids), items.images, items.has_image))
    with pytest.raises(UserError, match=r"num_tokens 78 exceeds the context length 77"):
        SharedClipEncoder(BackboneConfig(architecture=config.backbone.architecture), "full", 78, mask_padding=False)


@pytest.mark.parametrize("name", ["mimic_wikimel", "mimic_richpediamel", "mimic_wikidiverse"])
def test_shipped_configuration_is_the_published_one(name: str) -> None:
    config = load_config(name)
    train = config.train_of("mimic")
    assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (20, 128, 1e-5, 1e-4)
    assert train.optimizer == OptimizerConfig(eps=1e-4, decay="all_but_biases")
    assert config.system.pixels == PixelForm(resize="squash", filter="lanczos")
    assert (train.validate_every, train.patience, config.seed) == (2, 6, 43)
    network = resolve_architecture(config.backbone.architecture)
    assert (network.quick_gelu, network.context_length) == (True, 77)
    section = config.system
    assert (section.tune, section.width, section.num_tokens, section.mask_padding) == ("full", 96, 40, False)
    backbone = Backbone.build(config.backbone.architecture, None, device="meta")
    assert (backbone.text_width, backbone.vision_width, backbone.embed_width) == (512, 768, 512)
    backbone.tune(section.tune)
    # all of CLIP ViT-B/32 but the logit scale, which no score depends on
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 151_277_313 - 1


def test_pooled_features_have_length_one(matcher: MimicMatcher, items: ItemBatch) -> None:
    features = matcher.encode_entities(items)
    for name in ("text_global", "image_global"):
        pooled = features.dense(name)
        torch.testing.assert_close(pooled, F.normalize(pooled, dim=-1))
