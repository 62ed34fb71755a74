"""Meanings and remedies: each finding of an inspection in words, for training and for figures.

Keys are the names of checks, and the reasons in `rejects.jsonl`. Texts of batches take figures in braces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsmip.data.manifest import SPLITS

Kind = Literal["leak", "flaw", "property"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What is behind a finding.

    Attributes:
        kind: "leak": something gives an answer away, so that figures are too high. "flaw": the records are faulty.
            "property": how the data is and how hard it is; nothing is wrong.
        means: What it does to training and to figures.
        remedy: What to do.
    """

    kind: Kind
    means: str
    remedy: str


_SPLIT_ANEW = (
    "Split anew with dsmip prepare --split 70/10/20 (layouts jsonl and melbench), which keeps equal sentences and"
    " picture files together; or leave these mentions out of the split."
)
_EVALUATED = "look at the group picture in the figures of dsmip evaluate"


def _leaks(what: str, remembered: str) -> dict[str, Meaning]:
    """Leaks of mentions by the split that has the same `what`."""
    remedy = _SPLIT_ANEW
    if what == "picture":
        remedy += " Copies in files of different names are not seen by --split: give them one name first."
    both = f"Validation chooses epochs and trials, and test has the same {what}: test figures are a little too high."
    return {
        "train": Meaning(
            "leak",
            f"Training saw this {what}. {remembered} The split's hits can be too high by up to this share.",
            remedy,
        ),
        "validation": Meaning("leak", both, remedy),
        "test": Meaning("leak", both, remedy),
    }


_SENTENCE = _leaks("sentence", "Where the word and the gold are the same too, the answer can be remembered.")
_PICTURE = _leaks("picture", "Where the gold is the same too, a picture that is known by heart gives the answer away.")

OF_MENTIONS: Mapping[str, Meaning] = {
    "with_picture": Meaning(
        "property",
        "The others give the models an empty picture: their text alone can link them.",
        f"If it should be more, see 'What preparation touched' for lost pictures. For those with one, {_EVALUATED}.",
    ),
    "gold_with_picture": Meaning(
        "property",
        "Where the gold has none, a mention's picture cannot find it: to a visual expert all entities without a picture"
        " are equal.",
        "Add pictures of the entities that are linked to most.",
    ),
    "both_with_picture": Meaning(
        "property",
        "Only these can be linked by their picture; a visual expert learns from them alone.",
        f"Under half: expect little of the visual expert, and {_EVALUATED}.",
    ),
    "neither_with_picture": Meaning(
        "property",
        "Text alone decides.",
        "Many of them: compare with the text expert alone (dsmip evaluate --model text).",
    ),
    "without_sentence": Meaning(
        "flaw",
        "The word is all the text there is: nothing around it tells what an ambiguous word stands for.",
        "Add the sentences to the release, or leave these mentions out.",
    ),
    "word_absent": Meaning(
        "flaw",
        "Models read 'word : sentence', so it does no harm where the word is only spelled or inflected differently."
        " Where the sentence is about something else, it misleads.",
        "Look at the examples; mend sentences that belong to another mention.",
    ),
    "text_cut": Meaning(
        "flaw",
        "What stands behind the cut is never read; with prompts some tokens less are.",
        "Shorten the sentences around the word before dsmip prepare.",
    ),
    "with_desc": Meaning(
        "property",
        "dsmip enhance has chosen a description for these by word and sentence; templates with {desc} read it.",
        "Nothing to mend. The others' {desc} is empty.",
    ),
    "desc_of_gold": Meaning(
        "property",
        "The text that was chosen is, or holds, what the knowledge base says of the gold: a model that reads both finds"
        " the gold by comparing copies. It is the share that the chooser got right where it chose from the knowledge"
        " base.",
        "Report figures with {desc} in system.template.mention and without it.",
    ),
    "word_is_gold_name": Meaning(
        "property",
        "Here the word alone leads to the gold, or to it and its namesakes.",
        "Nothing to mend. How far a plain look-up comes: 'looking the word up among names finds the gold alone'.",
    ),
    "lookup_finds": Meaning(
        "property",
        "A look-up of names, without any model, has this hits@1.",
        "Take it as the figure that a model has to beat.",
    ),
    "word_names_none": Meaning(
        "property",
        "No name is equal to the word: sentence, attributes and pictures must do it.",
        "If the entities have other names (aliases), write them into their attributes.",
    ),
    "word_names_several": Meaning(
        "property",
        "Names alone cannot decide: attributes and pictures must tell the namesakes apart.",
        "Nothing to mend; see 'another entity has its name' for what the namesakes have.",
    ),
    "word_names_another": Meaning(
        "property",
        "The name points at an entity that is not the gold: a model that trusts names goes wrong.",
        "Look at the examples: mend golds that are wrong. The others are the hard ones, and right as they are.",
    ),
    "word_of_several_golds": Meaning(
        "property",
        "The same word stands for several entities in the data: context must decide, which is what linking is about.",
        "Nothing to mend. dsmip evaluate has figures of these alone (group ambiguity).",
    ),
    "gold_has_twin": Meaning(
        "flaw",
        "Another entity has the gold's name and attributes. Text cannot tell them apart: which of the two comes first"
        " is chance, and where both are in a batch training pushes the twin away.",
        "Merge the duplicates in the release, or give them attributes that differ.",
    ),
    "gold_unseen": Meaning(
        "property",
        "No training mention links to these entities: the figures say what a model does with new ones. Few of them: the"
        " figures say little about new entities.",
        "Nothing to mend. Report both groups (gold_seen in dsmip evaluate).",
    ),
    **{f"sentence_in_{split}": _SENTENCE[split] for split in SPLITS},
    "duplicate": Meaning(
        "flaw",
        "Copies count double: in training as weight, in a test split as votes. A copy in another split is a leak.",
        "Leave all but one out of the release.",
    ),
    "contradicted": Meaning(
        "flaw",
        "The same text has two answers. By text one of the two stays wrong, and training pulls both ways.",
        "Look at the examples and mend wrong golds. Where one sentence has the word twice, for two entities, only the"
        " picture can decide: leave them out if it cannot.",
    ),
    **{f"picture_{alike}_in_{split}": _PICTURE[split] for split in SPLITS for alike in ("exact", "near")},
    **{
        f"picture_{alike}_of_gold": Meaning(
            "leak",
            f"The mention shows {what} the entity's picture: finding it is comparing files. In training the visual"
            " expert learns just that; in the other splits hits can be too high by up to this share.",
            "Give one of the two another picture, or report the figures without these mentions.",
        )
        for alike, what in (("exact", "a copy of"), ("near", "a copy of, or nearly,"))
    },
    **{
        f"picture_{alike}_of_another": Meaning(
            "flaw",
            "The picture is that of an entity that is not the gold: it leads the visual expert to the wrong one.",
            "Look at the examples: mend golds or pictures that were mixed up; remove placeholders.",
        )
        for alike in ("exact", "near")
    },
    "picture_plain": Meaning(
        "flaw",
        "Nothing is to be seen on it, but it counts as a picture: to a visual expert all of them are alike.",
        "Remove such files: without a picture the record counts as what it is, one that text alone can link.",
    ),
    "picture_unreadable": Meaning(
        "flaw",
        "It was prepared and can no longer be decoded: it is read as no picture.",
        "The shard is damaged: run dsmip verify, and prepare the data set again.",
    ),
}

OF_ENTITIES: Mapping[str, Meaning] = {
    "with_picture": Meaning(
        "property",
        "To a visual expert the others are all equal.",
        "Add pictures of the entities that mentions link to; see 'What preparation touched' for lost ones.",
    ),
    "without_attributes": Meaning(
        "flaw",
        "The name is all that is read of them: text cannot tell namesakes apart.",
        "Add a description: one sentence helps.",
    ),
    "text_cut": Meaning(
        "flaw",
        "What stands behind the cut is never read; with prompts some tokens less are.",
        "Put first what tells entities apart, or take the shorter text (dsmip prepare --entity-text).",
    ),
    "gold_of_a_mention": Meaning(
        "property",
        "The others are never an answer: they make the task harder, as in real use, and train nothing.",
        "Nothing to mend. train.extra_negatives draws them into batches as wrong answers.",
    ),
    "name_shared": Meaning(
        "property",
        "Names alone do not tell these entities apart: attributes and pictures must.",
        "Look at the examples: write what tells them apart into the attributes' first words.",
    ),
    "duplicate": Meaning(
        "flaw",
        "Text cannot tell these entities apart: which of them comes first is chance.",
        "Merge them in the release, or give them attributes that differ.",
    ),
    **{
        f"picture_{alike}_shared": Meaning(
            "flaw",
            f"Entities whose pictures are {what} get {what} visual score: a visual expert cannot choose.",
            "Look at the examples: remove placeholders and pictures of the wrong entity. Where entities do look alike,"
            " nothing is to be mended: their texts must tell them apart.",
        )
        for alike, what in (("exact", "the same"), ("near", "nearly the same"))
    },
    "picture_plain": OF_MENTIONS["picture_plain"],
    "picture_unreadable": OF_MENTIONS["picture_unreadable"],
}

OF_BATCHES = Meaning(
    "property",
    "{share} of the batches hold mentions of the same gold, {mean:.2f} pairs of them on average. They are no false"
    " negatives: dsmip leaves such pairs out of the loss.",
    "Nothing, as long as the mean is near that of batches drawn at random ({expected:.2f}). Far above it, mentions of"
    " one gold lie together: prepare again with another --seed.",
)

# By what preparation did; `OF_REASONS` says more of some reasons.
OF_ACTIONS: Mapping[str, Meaning] = {
    "rejected": Meaning(
        "flaw",
        "Left out: neither trained on nor counted in any figure.",
        "rejects.jsonl names each record: mend the release and prepare again, if they are many.",
    ),
    "degraded": Meaning(
        "flaw",
        "Kept without what was wrong: models see less of these records.",
        "rejects.jsonl names each record: mend the release and prepare again, if they are many.",
    ),
    "repaired": Meaning("property", "Kept, and nothing was lost.", "Nothing to do."),
}
_NO_PICTURE = "Kept without this picture: if it was the only one, text alone links the record."
OF_REASONS: Mapping[str, Meaning] = {
    **dict.fromkeys(
        ("null gold", "nil gold"),
        Meaning(
            "property",
            "Mentions whose entity is in no knowledge base. They are left out of training and of all ranks. Rejected:"
            " of all figures, too. Degraded (--keep-nil): figures of 'not in the knowledge base' count them.",
            "Nothing, if that is meant. Else add the entities, and the answers, to the release.",
        ),
    ),
    "unknown gold": Meaning(
        "flaw",
        "The answer is no entity of the knowledge base, so it could never be found: left out of training and ranks."
        " Degraded (--keep-nil): figures of 'not in the knowledge base' count it.",
        "Add the entities to the knowledge base, or see whether ids are written in two ways (Q1, q1).",
    ),
    "picture missing": Meaning(
        "flaw",
        _NO_PICTURE,
        "See in rejects.jsonl which files were looked for, and where docs/data.md says they may lie.",
    ),
    "picture ambiguous": Meaning(
        "flaw", _NO_PICTURE, "The name fits several files: write it in the records with its folder."
    ),
    "picture unreadable": Meaning("flaw", _NO_PICTURE, "Save the file anew as JPEG or PNG; cut-off files are refused."),
    "picture too large": Meaning("flaw", _NO_PICTURE, "Make the file smaller before dsmip prepare."),
    "picture outside the folder": Meaning("flaw", _NO_PICTURE, "Move the pictures into the release's folder."),
    "empty sentence": OF_MENTIONS["without_sentence"],
    "empty attributes": OF_ENTITIES["without_attributes"],
    "wrong span": Meaning(
        "flaw",
        "The word does not stand where the record says. Repaired: it occurs once in the sentence. Degraded: it does"
        " not, and the sentence may be about something else.",
        "See 'word is not in the sentence' and its examples.",
    ),
}


def meaning_of(reason: str, action: str) -> Meaning:
    """That of what preparation touched."""
    return OF_REASONS.get(reason, OF_ACTIONS[action])
