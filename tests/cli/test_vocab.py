"""`fastkd vocab prune`: what plain transformers opens afterwards computes what the whole model did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fastkd.cli.main import main
from fastkd.models.load import save_model
from fastkd.models.prune import prune_model
from fastkd.vocab.map import VocabMap
from tests import tiny

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def byte_level(vocabulary: int = 600, **attributes) -> PreTrainedTokenizerFast:
    """As RoBERTa's: the padding id is 1, and no text holds it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(tiny.lines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL, **attributes)


def roberta(**settings) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return RobertaForMaskedLM(
        RobertaConfig(vocab_size=600, max_position_embeddings=114, initializer_range=0.2, **{**shape, **settings})
    ).eval()


def counted(model: str, folder: Path) -> list[str]:
    """`vocab count` of the lines, and the arguments of `vocab prune` that follow from it."""
    (folder / "text.txt").write_text("\n".join(tiny.lines()))
    counts = str(folder / "counts")
    assert main(["vocab", "count", "--model", model, "--data", str(folder / "text.txt"), "--output_dir", counts]) == 0
    return ["vocab", "prune", "--model", model, "--counts", counts, "--output_dir", str(folder / "pruned")]


@pytest.mark.parametrize(("flags", "kept"), [([], 384), (["--multiple_of", "1"], 300), (["--multiple_of", "64"], 320)])
def test_the_number_of_rows_is_rounded_up_as_is_asked(tmp_path, capsys, flags, kept):
    model = tiny.save(tmp_path / "whole", tiny.bert(), tiny.wordpiece())
    assert main([*counted(model, tmp_path), "--keep", "300", *flags]) == 0
    assert f"600 -> {kept} vocabulary rows" in capsys.readouterr().out
    assert main(["vocab", "prune", "--help"]) == 0
    assert "rounded up to --multiple_of" in " ".join(capsys.readouterr().out.split())


def test_a_model_that_counts_positions_from_its_padding_id(tmp_path):
    """Its likeliest tokens are those of the whole model, in padded batches up to its last position."""
    tokenizer, whole = byte_level(), roberta()
    assert main([*counted(tiny.save(tmp_path / "whole", whole, tokenizer), tmp_path), "--keep", "0.6"]) == 0
    pruned, opened = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / "pruned").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "pruned"),
    )
    assert pruned.config.pad_token_id == opened.pad_token_id == 1 and pruned.config.vocab_size == len(opened) == 384
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(opened.convert_ids_to_tokens(slot)) for slot in range(384)])
    slots = torch.randint(4, 384, (3, 112), generator=torch.Generator().manual_seed(0))
    slots[1, -30:], slots[2, -100:] = 1, 1
    mask = (slots != 1).long()
    with torch.no_grad():
        likeliest = [
            model(given, attention_mask=mask).logits[..., columns].argmax(-1)[mask == 1]
            for model, given, columns in ((whole, ids[slots], ids), (pruned, slots, slice(None)))
        ]
    assert torch.equal(*likeliest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_and_the_generation_configuration_are_the_models_own(dtype, tmp_path):
    tokenizer, whole = byte_level(extra_special_tokens=["<turn>"]), tiny.llama(704, eos_token_id=2, pad_token_id=1).to(dtype)
    folder = tiny.save(tmp_path / "whole", whole, tokenizer)
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    given = {"eos_token_id": [turn, 2], "pad_token_id": 1, "temperature": 0.6, "do_sample": True}
    (tmp_path / "whole/generation_config.json").write_text(json.dumps(given))
    assert main([*counted(folder, tmp_path), "--keep", "0.6"]) == 0
    pruned, opened = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto"),
        AutoTokenizer.from_pretrained(tmp_path / "pruned"),
    )
    assert pruned.dtype == dtype
    found = GenerationConfig.from_pretrained(tmp_path / "pruned")
    assert found.eos_token_id == opened.convert_tokens_to_ids(["<turn>", "</s>"])
    assert (found.pad_token_id, found.temperature, found.do_sample) == (opened.pad_token_id, 0.6, True)


def test_a_mapped_student_is_pruned_further(tmp_path):
    """The tokenizer is the teacher's, the rows are those of the map; what is pruned is among them."""
    tokenizer, whole = byte_level(), roberta()
    counts = torch.arange(600, 0, -1)
    first = VocabMap.from_counts(counts, 520, multiple_of=1).assign_stand_ins(whole.lm_head.decoder.weight.detach())
    save_model(prune_model(whole, first), tokenizer, tmp_path / "student")
    assert main([*counted(str(tmp_path / "student"), tmp_path), "--keep", "0.6"]) == 0
    pruned, opened = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / "pruned").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "pruned"),
    )
    assert pruned.config.vocab_size == len(opened) == 384  # 0.6 of 520 ids, in steps of 128
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(opened.convert_ids_to_tokens(slot)) for slot in range(384)])
    assert first.is_kept[ids].all()
    slots = torch.randint(4, 384, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = whole(ids[slots]).logits[..., ids], pruned(slots).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ids_with_gaps(tmp_path):
    """Chat tokens far behind the text's ids: they are kept, and numbers that name no token are not."""
    backend = json.loads(byte_level(500).backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {f"<chat{number}>": 540 + number for number in range(5)}
    chat = [f"<chat{number}>" for number in range(5)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **SPECIAL, extra_special_tokens=chat)
    assert tokenizer.convert_tokens_to_ids(chat) == [540, 541, 542, 543, 544] and len(tokenizer) == 505
    folder = tiny.save(tmp_path / "whole", tiny.llama(600, pad_token_id=1), tokenizer)
    assert main([*counted(folder, tmp_path), "--keep", "600"]) == 0
    opened = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert opened.get_vocab().keys() == tokenizer.get_vocab().keys()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.vocab_size == 505


def test_an_id_without_a_row(tmp_path, capsys):
    """As Gemma 3 and CodeLlama: it goes where no text has it, and is refused where it was counted or has to be kept."""
    tokenizer = byte_level(extra_special_tokens=["<image>"])
    folder = tiny.save(tmp_path / "whole", tiny.llama(600, pad_token_id=1), tokenizer)
    prune = [*counted(folder, tmp_path), "--keep", "0.6"]
    assert main([*prune, "--protected", "<image>"]) == 2
    assert "protected names id 600, which cannot be kept: it has no row in the model" in capsys.readouterr().err
    assert main(prune) == 0
    opened = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert len(opened) == AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.vocab_size == 384
    assert "<image>" not in opened.get_vocab() and opened.decode(opened("def <image>")["input_ids"]) == "def <image>"
    (tmp_path / "more").mkdir()
    (tmp_path / "more/text.txt").write_text("an <image> here\n")
    count = [
        "vocab",
        "count",
        "--model",
        folder,
        "--data",
        str(tmp_path / "more/text.txt"),
        "--output_dir",
        str(tmp_path / "more/counts"),
    ]
    assert main(count) == 0
    prune[prune.index("--counts") + 1], prune[prune.index("--output_dir") + 1] = (
        str(tmp_path / "more/counts"),
        str(tmp_path / "more/out"),
    )
    assert main(prune) == 2
    assert "Id 600 was counted 1 times and vocab_size is 600: it has no row in the model" in capsys.readouterr().err
