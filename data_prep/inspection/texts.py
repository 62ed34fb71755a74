"""Checks of texts: truncation, ambiguity, unseen golds, and sentences that splits share."""

import numpy as np

from data_prep.inspection.checks import NOBODY, Check, combine, first_of_group, groups_of, other_of_group
from data_prep.inspection.columns import Columns, EntityColumns, Flags, Ints
from dsmip.data.manifest import SPLITS


def mention_checks(columns: Columns) -> list[Check]:
    """Checks over all mentions, in the order of a report."""
    mentions, entities = columns.mentions, columns.entities
    everyone = np.ones(len(mentions.gold), np.bool_)
    has_gold_image = entities.num_images[mentions.gold] > 0
    return [
        Check("with_picture", "has a picture", mentions.has_image, everyone),
        Check("gold_with_picture", "gold has a picture", has_gold_image, everyone),
        Check("both_with_picture", "both have one", mentions.has_image & has_gold_image, everyone),
        Check("neither_with_picture", "neither has one", ~mentions.has_image & ~has_gold_image, everyone),
        Check("without_sentence", "has no sentence", ~mentions.has_sentence, everyone),
        Check("word_absent", "word is not in the sentence", ~mentions.has_word, mentions.has_sentence),
        Check(
            "text_cut",
            f"text is cut at {columns.context_length} tokens",
            mentions.positions > columns.context_length,
            everyone,
        ),
        *_descriptions(columns, everyone),
        *_ambiguity(columns, everyone),
        *_unseen(columns, everyone),
        *_shared_sentences(columns),
        *_repeats(columns, everyone),
    ]


def entity_checks(columns: Columns) -> list[Check]:
    """Checks over all entities, in the order of a report."""
    entities = columns.entities
    everyone = np.ones(len(entities.name), np.bool_)
    same_name, same_text = groups_of(entities.name), groups_of(entities.text)
    namesake, copy = other_of_group(same_name, everyone), other_of_group(same_text, everyone)
    is_gold = np.isin(np.arange(len(everyone)), columns.mentions.gold)
    return [
        Check("with_picture", "has a picture", entities.num_images > 0, everyone),
        Check("without_attributes", "has no attributes", ~entities.has_attributes, everyone),
        Check(
            "text_cut",
            f"text is cut at {columns.context_length} tokens",
            entities.positions > columns.context_length,
            everyone,
        ),
        Check("gold_of_a_mention", "is the gold of a mention", is_gold, everyone),
        Check("name_shared", "another entity has its name", namesake != NOBODY, everyone, namesake, "entity"),
        Check("duplicate", "another has its name and attributes", copy != NOBODY, everyone, copy, "entity"),
    ]


def _descriptions(columns: Columns, everyone: Flags) -> list[Check]:
    """Of data that 'dsmip enhance' has made."""
    mentions = columns.mentions
    return [
        Check("with_desc", "has an added description", mentions.has_desc, everyone),
        Check("desc_of_gold", "added description is the gold's own text", mentions.desc_of_gold, mentions.has_desc),
    ]


def _ambiguity(columns: Columns, everyone: Flags) -> list[Check]:
    mentions, entities = columns.mentions, columns.entities
    names, first_entity, num_bearers = np.unique(entities.name, return_index=True, return_counts=True)
    index = np.minimum(np.searchsorted(names, mentions.word), max(len(names) - 1, 0))
    known = names[index] == mentions.word
    bearers = np.where(known, num_bearers[index], 0)
    is_name = entities.name[mentions.gold] == mentions.word
    other_golds = _other_gold(groups_of(mentions.word), mentions.gold)
    name_bearer = np.where(known & ~is_name, first_entity[index], NOBODY)
    return [
        Check("word_is_gold_name", "word is the gold's name", is_name, everyone),
        Check(
            "lookup_finds", "looking the word up among names finds the gold alone", is_name & (bearers == 1), everyone
        ),
        Check("word_names_none", "word is no entity's name", bearers == 0, everyone),
        Check("word_names_several", "word is the name of several entities", bearers > 1, everyone),
        Check(
            "word_names_another",
            "word is another entity's name, not the gold's",
            known & ~is_name,
            everyone,
            name_bearer.astype(np.int64),
            "entity",
        ),
        Check(
            "word_of_several_golds",
            "word is ambiguous: it links to several golds",
            other_golds != NOBODY,
            everyone,
            other_golds,
        ),
        Check(
            "gold_has_twin",
            "gold has a duplicate in the kb",
            _twins(entities)[mentions.gold] != NOBODY,
            everyone,
            _twins(entities)[mentions.gold],
            "entity",
        ),
    ]


def _unseen(columns: Columns, everyone: Flags) -> list[Check]:
    mentions = columns.mentions
    in_train = mentions.split == SPLITS.index("train")
    unseen = ~np.isin(mentions.gold, mentions.gold[in_train])
    return [Check("gold_unseen", "gold is unseen in training", unseen, everyone & ~in_train)]


def _shared_sentences(columns: Columns) -> list[Check]:
    mentions = columns.mentions
    groups = groups_of(mentions.sentence)
    checks = []
    for number, split in enumerate(SPLITS):
        inside = (mentions.split == number) & mentions.has_sentence
        partner = first_of_group(groups, inside)[groups]
        of = mentions.split != number
        hits = of & mentions.has_sentence & (partner != NOBODY)
        checks.append(
            Check(f"sentence_in_{split}", f"sentence is in {split} too", hits, of, np.where(hits, partner, NOBODY))
        )
    return checks


def _repeats(columns: Columns, everyone: Flags) -> list[Check]:
    mentions = columns.mentions
    text = combine(mentions.word, mentions.sentence)
    same = other_of_group(combine(text, mentions.gold), everyone)
    against = _other_gold(text, mentions.gold)
    return [
        Check("duplicate", "another mention has its word, sentence and gold", same != NOBODY, everyone, same),
        Check(
            "contradicted",
            "another has its word and sentence, but not its gold",
            against != NOBODY,
            everyone,
            against,
        ),
    ]


def _other_gold(groups: Ints, gold: Ints) -> Ints:
    """Another mention of each one's group with another gold, or NOBODY."""
    if not len(groups):
        return groups
    order = np.lexsort((np.arange(len(gold)), gold, groups))
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) != 0])
    ends = np.r_[starts[1:], len(order)] - 1
    # sorted by gold inside a group: its first and its last mention differ in gold when any two do
    low, high = order[starts][groups], order[ends][groups]
    other = np.where(gold[low] != gold, low, high)
    return np.where(gold[other] != gold, other, NOBODY).astype(np.int64)


def _twins(entities: EntityColumns) -> Ints:
    """Another entity of the same name and attributes, or NOBODY."""
    groups = groups_of(entities.text)
    return other_of_group(groups, np.ones(len(groups), np.bool_))
