"""Small tokenizers and models, made on the spot from Python's own sources."""

from __future__ import annotations

import functools
import inspect
import json
import random
import textwrap
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache
def lines() -> tuple[str, ...]:
    """A few thousand non-empty lines of text."""
    modules = (json, random, textwrap, inspect, functools)
    text = "\n".join(inspect.getsource(m) for m in modules)
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@functools.cache
def wordpiece(vocabulary: int = 600) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        lines(), trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def byte_level(vocabulary: int = 700) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def bert(vocabulary: int = 600, seed: int = 0, **settings: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=vocabulary, pad_token_id=0, initializer_range=0.2, **{**shape, **settings}))
    torch.nn.init.normal_(model.cls.predictions.bias, std=1.0)
    return model.eval()


def llama(vocabulary: int = 700, seed: int = 0, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**shape, **settings})).eval()


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    """A folder that from_pretrained opens."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
