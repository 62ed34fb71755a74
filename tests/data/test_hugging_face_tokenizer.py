"""A tokenizer of the Hugging Face library, made on the spot: masks, cuts, padding, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dsmip.data.text import HuggingFaceTokenizer
from dsmip.errors import UserError

PAD, START, END = 3, 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"[UNK]": 0, "[CLS]": START, "[SEP]": END, "[PAD]": PAD, "a": 4, "dog": 5, "runs": 6}
    fast = Fast(WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = Whitespace()
    fast.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", START), ("[SEP]", END)])
    make: Any = PreTrainedTokenizerFast  # has no types
    whole = make(tokenizer_object=fast, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    path = tmp_path_factory.mktemp("tokenizer")
    whole.save_pretrained(path)
    return path


def test_texts_keep_their_last_token_and_padding_is_the_tokenizers(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(str(folder), 6)
    ids, mask = tokenizer(["a dog", "a dog runs a dog runs"], reserve=1)
    assert ids.tolist() == [[START, 4, 5, END, PAD], [START, 4, 5, 6, END]]
    assert mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert tokenizer.num_positions("a dog runs a dog runs") == 8


def test_a_context_that_must_be_full_is(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(str(folder), 6, fills_context=True)
    ids, mask = tokenizer(["dog"], reserve=1)
    assert ids.tolist() == [[START, 5, END, PAD, PAD]]
    assert torch.equal(mask.sum(dim=1), torch.tensor([3]))


def test_separators_may_be_no_tokens(folder: Path) -> None:
    ids, mask = HuggingFaceTokenizer(str(folder), 6, strip_sep_token=True, fills_context=True)(["a dog"])
    assert ids.tolist() == [[START, 4, 5, 0, 0, 0]]
    assert mask.tolist() == [[True] * 3 + [False] * 3]


def test_one_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*nowhere cannot be had .*give a folder that holds it"):
        HuggingFaceTokenizer(str(tmp_path / "nowhere"), 6)
