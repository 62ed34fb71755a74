"""A small BERT with random weights and a tokenizer of whole words, in a folder as sentence-transformers writes it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_MARKERS = ("[MASK]", "[unused0]", "[unused1]", "[unused2]")
_SIZE = 160


def write_small_bert(folder: Path, words: Iterable[str], places: int = 24) -> Path:
    """Two layers of 16 channels with dropout, pooled by the mean of tokens.

    Args:
        folder: Of its own.
        words: All that its tokenizer knows, beside BERT's special tokens: ids from 4 on, in their order.
        places: Of a text at most.
    """
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertModel(BertConfig(vocab_size=_SIZE, intermediate_size=32, **sizes)).save_pretrained(folder)
    known = list(dict.fromkeys([*_SPECIAL, *words, *_MARKERS]))
    assert len(known) <= _SIZE
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])  # type: ignore[assignment]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    of_library: Any = PreTrainedTokenizerFast
    of_library(tokenizer_object=tokenizer, mask_token="[MASK]", **special).save_pretrained(folder)
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {places}}}')
    return folder
