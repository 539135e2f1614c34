"""The vocabulary map of a run: what it keeps of its teacher's ids, and in which slots."""

from __future__ import annotations

import torch

from fastkd.models.language_model import LanguageModel
from fastkd.models.prune import prune_model
from fastkd.models.student import export_student
from fastkd.train.config import Vocabulary
from fastkd.train.vocabulary import build_vocab_map
from fastkd.vocab.count import TokenCounts, tokenizer_fingerprint
from fastkd.vocab.map import VocabMap
from fastkd.vocab.tokenizer import protected_ids
from tests import tiny


def counts_of(tokenizer, folder) -> str:
    """Counts of the lines, by `vocabulary.counts`."""
    ids = torch.tensor([number for line in tiny.lines() for number in tokenizer(line, add_special_tokens=False)["input_ids"]])
    size = 1 + max(tokenizer.get_vocab().values())
    TokenCounts(ids.bincount(minlength=size), len(tiny.lines()), "lines", tokenizer_fingerprint(tokenizer)).save(folder)
    return str(folder)


def test_the_padding_id_keeps_its_number_and_a_token_without_a_row_is_exported_by_nobody(tmp_path):
    tokenizer, teacher = tiny.wordpiece.__wrapped__(), LanguageModel(tiny.bert(600))
    tokenizer.add_tokens(["<image>"])
    vocabulary = Vocabulary(keep=0.6, counts=counts_of(tokenizer, tmp_path / "counts"))
    vocab_map = build_vocab_map(vocabulary, tokenizer, teacher, None, [], tmp_path)
    assert vocab_map.vocab_size == 600 and vocab_map.id_to_slot[0] == 0
    assert vocab_map.kept_ids[1:5].tolist() != [1, 2, 3, 4]  # the others are by frequency
    exported = export_student(prune_model(teacher, vocab_map), tokenizer, tmp_path / "export")
    assert "<image>" not in exported.get_vocab() and len(exported) == vocab_map.num_kept


def test_the_map_of_a_mapped_teacher_is_among_its_ids_and_reads_as_it_does(tmp_path):
    tokenizer, whole = tiny.wordpiece(), tiny.bert(600)
    first = VocabMap.from_counts(torch.arange(600), 400, protected_ids(tokenizer), multiple_of=1)
    first = first.assign_stand_ins(whole.get_output_embeddings().weight.detach())
    teacher = prune_model(whole, first)
    vocabulary = Vocabulary(keep=0.6, multiple_of=1, counts=counts_of(tokenizer, tmp_path / "counts"))
    both = build_vocab_map(vocabulary, tokenizer, teacher, None, [], tmp_path)
    assert (both.vocab_size, both.num_kept) == (600, 240) and first.is_kept[both.kept_ids].all()
    assert torch.equal(both.id_to_slot, both.id_to_slot[first.kept_ids[first.id_to_slot]])
