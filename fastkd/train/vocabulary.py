"""The student's vocabulary for a run: counted, chosen, given stand-ins, and saved once for all stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..models.language_model import LanguageModel
from ..models.prune import padding_ids
from ..tasks.cloze import label_word_ids
from ..tasks.cloze_task import ClozeTask
from ..tasks.corpus import Corpus
from ..vocab.count import TokenCounts, count_tokens, tokenizer_fingerprint
from ..vocab.map import VocabMap
from ..vocab.tokenizer import protected_ids, token_requirements, tokens_by_id
from .config import Vocabulary

log = logging.getLogger("fastkd")


def protected_words(task: ClozeTask, tokenizer: Any, rows: int | None = None) -> set[int]:
    """The ids that a vocabulary keeps for the sake of a task: its label words, and what is always kept; `rows`: of the model."""
    return {*protected_ids(tokenizer, task.label_words, rows=rows), *label_word_ids(task, tokenizer)}


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

    Protected are special and byte tokens, the words of `vocabulary.protected`, the label words of every task, and the teacher's padding
    id, which also keeps its number where that is below those kept. Only ids are kept that name a token and have a row of their own in
    the teacher, so that the map of one that has a map itself is among its kept ids. The similarity is that of the teacher's output
    rows; for a tied head they are its embedding.

    Raises:
        ValueError: counts of another tokenizer or none, or what `VocabMap.from_counts` refuses.
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
    first, tokens = teacher.vocab_map, tokens_by_id(tokenizer)
    known = tokens.keys() if first is None else tokens.keys() & set(first.kept_ids.tolist())
    rows = teacher.vocabulary if first is None else first.vocab_size
    # Where the architecture counts from the number of its padding id, the student's has to be the same.
    padding = {
        row if first is None else int(first.kept_ids[row]): row for row in padding_ids(teacher.model) if row < teacher.vocabulary
    }
    protected = {*protected_ids(tokenizer, vocabulary.protected, rows=rows), *(padding.keys() & known)}
    for task in tasks:
        protected |= protected_words(task, tokenizer, rows)
    chosen = VocabMap.from_counts(
        counts,
        vocabulary.keep,
        sorted(protected),
        vocabulary.multiple_of,
        requires=token_requirements(tokenizer),
        vocab_size=rows,
        exclude={*range(len(counts.counts))} - known,
    )
    chosen = chosen.pin({number: row for number, row in padding.items() if chosen.is_kept[number] and row < chosen.num_kept})
    coverage = counts.coverage(chosen.kept_ids)
    log.info("The student keeps %d of %d ids, %.2f %% of the corpus's tokens.", chosen.num_kept, len(tokens), 100 * coverage)
    weight = teacher.head.weight.detach()
    if first is None:
        return chosen.assign_stand_ins(weight, vocabulary.stand_ins, unk_id=tokenizer.unk_token_id)
    chosen = chosen.assign_stand_ins(weight[first.id_to_slot], vocabulary.stand_ins, unk_id=tokenizer.unk_token_id)
    # What the teacher reads as another id is read as that one is now.
    return VocabMap(chosen.kept_ids, chosen.id_to_slot[first.kept_ids[first.id_to_slot]])
