"""Keys of feature tables: digests of all that their content depends on, the same in every version of the code."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsmip.data.collate import Collator, ItemFormat
from dsmip.data.dataset import Dataset
from dsmip.data.images import CLIP_PIXELS
from dsmip.data.manifest import KB
from dsmip.encoders.base import FeatureEncoder, Side
from dsmip.encoders.clip import Backbone
from dsmip.keys import plain_text

_DTYPES = {torch.float32: "torch.float32", torch.float16: "torch.float16"}  # words of a key
# What a tokenizer makes of it tells it from others: case, accents, scripts, marks, a long word, special tokens.
_PROBE = "The naïve Fox's 2.5 km — ÉTÉ 東京 Ελλάδα \U0001f98a antidisestablishmentarianism <end_of_text> [SEP] #x_y/z"


def feature_key(
    weights: Mapping[str, Tensor], manifest_hash: str, item_format: ItemFormat, split: str, dtype: torch.dtype
) -> str:
    """Hex digest of all that a feature table depends on, version 1.

    The text is written out so that no name in the code is part of it: its words are those that the first caches were
    keyed by, and stay. A field that is added to `ItemFormat` or `Template` goes into the text only where its value
    changes what an encoder reads; a text that means something else starts with "version 2".
    """
    return fingerprint(weights, f"({manifest_hash!r}, {_items(item_format)}, {split!r}, {_DTYPES[dtype]})")


def content_key(
    encoder: FeatureEncoder, records: str, collator: Collator, side: Side, dtype: torch.dtype
) -> str | None:
    """Hex digest of all that a frozen encoder's table depends on, whichever run, part or system asks; version 2.

    Args:
        records: What they are, by their content (`content_of`).

    Returns:
        None: nobody else can use the table, as the encoder trains, or does not say what it makes.
    """
    form = encoder.shared_form()
    if form is None:
        return None
    item_format = _of_side(collator.item_format, side)
    items = [_items(item_format)]
    if "text" in item_format.modalities:
        tokenizer = collator.tokenizer
        ids = tokenizer([_PROBE]).ids[0].tolist()
        items.append(plain_text((tokenizer.context_length, tokenizer.pad_id, tokenizer.fills_context, ids)))
    if "image" in item_format.modalities:
        items.append(plain_text(collator.image_size))
    said = plain_text(("version 2", form, records, items, side, _DTYPES[dtype]))
    return fingerprint(encoder.encoder_state(), said)


def content_of(dataset: Dataset, split: str) -> tuple[str, ...]:
    """What stands for the records of a split or of the kb in keys: data sets with equal texts have equal records.

    Of a view's split first the whole one's, then its own.
    """
    digests = [shard.sha256 for shard in dataset.manifest.shards_of(split)]
    whole = plain_text([dataset.manifest.entities_sha256, *digests] if split == KB else digests)
    kept = dataset.kept.get(split)
    return (whole,) if kept is None else (whole, plain_text([whole, kept]))


def tower_form(name: str, encoder: nn.Module) -> str:
    """What a module makes of its backbones, for `FeatureEncoder.shared_form`.

    Args:
        name: What is made of them, with a number that goes up when something else is.
    """
    backbones = [module.form for module in encoder.modules() if isinstance(module, Backbone)]
    return plain_text((name, backbones))


def _of_side(item_format: ItemFormat, side: Side) -> ItemFormat:
    """Without what the other side's items are read by, which may change as it likes."""
    other = {"entity" if side == "mentions" else "mention": ""}
    texts = tuple((name, each.model_copy(update=other)) for name, each in item_format.texts)
    template = item_format.template.model_copy(update=other)
    read = item_format.modalities if side == "mentions" else item_format.of_entities
    return replace(item_format, template=template, texts=texts, modalities=read, entity_modalities=None)


def _items(item_format: ItemFormat) -> str:
    template, tokens = item_format.template, item_format.num_tokens
    texts = f"Template(mention={template.mention!r}, entity={template.entity!r})"
    modalities = plain_text(item_format.modalities)
    items = f"ItemFormat(template={texts}, reserve={item_format.reserve}, num_tokens={tokens}, modalities={modalities})"
    if (pixels := item_format.pixels) not in (None, CLIP_PIXELS):
        part = () if pixels.part == 1 else (pixels.part,)
        items += f", {plain_text((pixels.resize, pixels.filter, *part))}"
    if item_format.entity_modalities is not None:
        items += f", entity_modalities={plain_text(item_format.entity_modalities)}"
    if item_format.texts:
        further = tuple((name, each.mention, each.entity) for name, each in item_format.texts)
        items += f", texts={plain_text(further)}"
    if item_format.word_places:
        items += ", word_places=True"
    if item_format.markers:
        items += f", markers={plain_text(item_format.markers)}"
    return items


def fingerprint(weights: Mapping[str, Tensor], settings: str) -> str:
    """Hex digest of named tensors and of a text."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
