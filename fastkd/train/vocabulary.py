"""The student's vocabulary for a run: counted, chosen, given stand-ins, and saved once for all stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.language_model import LanguageModel
from ..tasks.cloze import label_word_ids
from ..tasks.cloze_task import ClozeTask
from ..tasks.corpus import Corpus
from ..vocab.count import TokenCounts, count_tokens, tokenizer_fingerprint
from ..vocab.map import VocabMap
from ..vocab.tokenizer import protected_ids, token_requirements
from .config import Vocabulary

log = logging.getLogger("fastkd")


def protected_words(task: ClozeTask, tokenizer: Any) -> set[int]:
    """The ids that a vocabulary keeps for the sake of a task: its label words, and what is always kept."""
    return {*protected_ids(tokenizer, task.label_words), *label_word_ids(task, tokenizer)}


def build_vocab_map(
    vocabulary: Vocabulary,
    tokenizer: Any,
    teacher: LanguageModel,
    corpus: Corpus | None,
    tasks: Sequence[ClozeTask],
    cache_dir: Path,
    poll: Callable[[], None] = lambda: None,
) -> VocabMap:
    """Count `corpus` (or load the counts named), keep protected and frequent ids, and give every other id its stand-in.

    Protected are special and byte tokens, the words of `vocabulary.protected`, and the label words of every task. The similarity is
    that of the teacher's output rows; for a tied head they are its embedding.
    """
    if vocabulary.counts is not None:
        counts = TokenCounts.load(vocabulary.counts)
        if counts.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"vocabulary.counts={vocabulary.counts!r} holds the counts of another tokenizer; count with this one (`fastkd vocab "
                "count --model`), or leave the key out."
            )
    elif corpus is not None:
        name = f"{corpus.fingerprint[:16]}-{tokenizer_fingerprint(tokenizer)[:16]}"
        counts = count_tokens(corpus, tokenizer, cache_dir / "counts" / name, poll=poll)
    else:
        raise ValueError("vocabulary needs counts of tokens, and no stage has text: set vocabulary.counts (see `fastkd vocab count`).")
    protected = {*protected_ids(tokenizer, vocabulary.protected)}
    for task in tasks:
        protected |= protected_words(task, tokenizer)
    chosen = VocabMap.from_counts(
        counts,
        vocabulary.keep,
        sorted(protected),
        vocabulary.multiple_of,
        requires=token_requirements(tokenizer),
        vocab_size=max(teacher.vocabulary, len(tokenizer)),
    )
    coverage = counts.coverage(chosen.kept_ids)
    log.info("The student keeps %d of %d ids, %.2f %% of the corpus's tokens.", chosen.num_kept, len(tokenizer), 100 * coverage)
    rows = teacher.head.weight.detach()
    if rows.shape[0] < chosen.vocab_size:
        rows = torch.cat([rows, rows.new_zeros(chosen.vocab_size - rows.shape[0], rows.shape[1])])
    return chosen.assign_stand_ins(rows, vocabulary.stand_ins, unk_id=tokenizer.unk_token_id)
