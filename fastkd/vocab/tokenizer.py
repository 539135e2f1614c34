"""Rewrite a Hugging Face fast tokenizer so that it knows only a kept set of ids, renumbered to slots.

The result is saved by `save_pretrained` and opened by plain `AutoTokenizer.from_pretrained`, without fastkd.

Contract. *Text whose teacher tokenization uses only kept tokens is tokenized identically by the pruned tokenizer, through
the renumbering id -> slot.* Normalizer, pre-tokenizer, added-token matching and decoder are untouched, so one pre-token
at a time is enough:

* BPE: the merges inside the span of a final token never look outside it, so they are the run of BPE on that token alone,
  and `token_requirements` keeps every step of it. By induction both runs reach the same state: the pair the teacher
  merges is kept and was the lowest rank among all pairs, so it is the lowest among the kept ones. (A model that
  looks up whole pre-tokens first, `ignore_merges`, finds the kept ones and no other, as before.)
* WordPiece, WordLevel: the longest match (the word) in the full vocabulary is kept, so it is still the longest. The
  unknown token is the exception of WordPiece: it hides the pieces matched before the failure, and these may be dropped,
  so a line with it does not count as fully kept. The limit `max_input_chars_per_word` does not change.
* Unigram: the best path is kept. Every other path of the pruned lattice is one of the teacher's, or has a dropped
  one-character piece replaced by the unknown penalty (lowest score - 10), which scores less than the piece did. The
  penalty itself does not move because the piece of lowest score is protected.

All other text is split into kept pieces, which is what a dropped token becomes: the format gives every id one string and
merges work on ids, so a dropped string cannot share the slot of the stand-in that `VocabMap` assigns to its id.

An added token that the model itself does not know becomes a model entry, the only way to give it any slot but the last
ones. BPE cannot reach it without a merge; WordPiece and Unigram can only where text *becomes* the added token after
added tokens were matched (for example by lower-casing); `check_pruned_tokenizer` finds such a line.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from fastkd.tasks.token_rows import num_ids
from fastkd.vocab.tokenizer_backend import (
    Spec,
    id_fields,
    inserted_id_fields,
    merge_parents,
    model_tokens,
    read_spec,
    restrict_model,
    unk_id,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

log = logging.getLogger("fastkd")
# Printable ASCII, and the space as Metaspace writes it.
_SPELLING = frozenset(map(chr, range(0x20, 0x7F))) | {"▁"}


@dataclass(frozen=True)
class PrunedAgreement:
    """How far a pruned tokenizer agrees with its teacher on some lines; every number is a count.

    A line is fully kept if the contract of this module covers it. A token is equal if both tokenizers put the same token
    on the same characters.
    """

    lines: int
    lines_fully_kept: int
    lines_equal: int
    tokens: int
    tokens_equal: int

    @property
    def tokens_equal_share(self) -> float:
        """Share of the teacher's tokens that the pruned tokenizer gives back, 1.0 for no tokens."""
        return self.tokens_equal / self.tokens if self.tokens else 1.0


def tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> the token that it names, by increasing id. Ids may have gaps, and a piece that Unigram lists twice has two."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(num_ids(tokenizer))))
    return {number: token for number, token in enumerate(tokens) if token is not None}


def protected_ids(tokenizer: PreTrainedTokenizerBase, extra_tokens: Iterable[str] = (), *, rows: int | None = None) -> list[int]:
    """Ids that every kept set must hold, in increasing order.

    These are the special and added tokens, every id the post-processor or the padding inserts, and of the model:

    * the unknown token, and the byte tokens `<0x00>` to `<0xFF>` of a model with byte fallback;
    * byte-level BPE: the single bytes, so that every text still round-trips; the single characters also of a BPE that
      has neither unknown token nor byte fallback, which would silently drop what it cannot spell;
    * the other subword models: single printable ASCII characters, at the start and inside of a word. They are some 200 ids and
      keep a dropped word spellable, where WordPiece would turn all of it into the unknown token. The characters of other
      scripts, thousands of them, are left to their counts;
    * Unigram: the piece of lowest score, which sets the score of the unknown token.

    Each string of `extra_tokens` is added where it is one token: as written, stripped, and lower-cased, each of the stripped
    forms with and without a leading space. Of one that is several tokens in every form, all tokens of the form as written are
    added, at the start and inside of a text; the log names these, and those that the tokenizer knows as its unknown token alone.

    Args:
        tokenizer: a fast one.
        extra_tokens: words to keep, as said above.
        rows: of the model. An added token without a row that nothing inserts, such as the image token of a text model, can
            then be dropped; None: every id has its row.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: its model or post-processor is of an unknown kind, has no unknown token where it needs one, or a special
            token is not in the vocabulary.
    """
    return sorted(_protected_ids(tokenizer, read_spec(tokenizer), rows) | _ids_of_words(tokenizer, extra_tokens))


def token_requirements(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[int, ...]]:
    """Token id -> ids of the tokens that BPE merges last to build it, its parents; empty for the other models.

    Where several merges give one token, its parents are those of the merge that BPE really executes on the token's own
    text, which need not be the merge of lowest rank. A kept set closed under this map keeps every token reachable by
    the steps the teacher took. Tokens that BPE never builds (characters, added tokens) have no entry.

    Raises:
        TypeError, ValueError: as `protected_ids`.
    """
    return merge_parents(read_spec(tokenizer)["model"])


def prune_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kept_ids: torch.Tensor | Sequence[int], *, rows: int | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer that knows only the tokens of `kept_ids` (V_k,), integers, where token `kept_ids[slot]` has the id `slot`.

    It is a plain `PreTrainedTokenizerFast`, also for a model-specific tokenizer class: those rebuild parts of the backend
    from hard-wired defaults when they are opened, the plain class takes `tokenizer.json` as it stands. Special tokens,
    lengths, sides, chat template and model input names are carried over; methods of a subclass are not.

    Args:
        tokenizer: the teacher's.
        kept_ids: (V_k,), the id behind every slot.
        rows: as of `protected_ids`: an added token that it lets go becomes text like any other.

    Raises:
        TypeError: the tokenizer is not a fast one, or `kept_ids` is not a vector of integers.
        ValueError: `kept_ids` has duplicates or ids without a token, misses one of `protected_ids(tokenizer)`, or is not
            closed under `token_requirements(tokenizer)`; or the tokenizer is refused as in `protected_ids`.
    """
    spec, token_of = read_spec(tokenizer), tokens_by_id(tokenizer)
    kept = _check_kept_ids(kept_ids, token_of, _protected_ids(tokenizer, spec, rows), merge_parents(spec["model"]))
    _check_order_of_equal_tokens(kept, token_of, tokenizer.get_vocab())

    slot_of = {token_id: slot for slot, token_id in enumerate(kept)}
    dropped = [token["content"] for token in spec["added_tokens"] if token["id"] not in slot_of]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] in slot_of]
    for holder, key in id_fields(spec):
        holder[key] = slot_of[holder[key]]
    restrict_model(spec["model"], {token_id: token_of[token_id] for token_id in kept})

    pruned = _open(tokenizer, spec, dropped)
    if pruned.get_vocab() != {token_of[token_id]: slot for token_id, slot in slot_of.items()}:
        raise RuntimeError(
            f"transformers opened the pruned {type(tokenizer).__name__} with {len(pruned)} tokens where {len(kept)} were "
            "kept, or with other ids; please report this tokenizer."
        )
    return pruned


def check_pruned_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    pruned: PreTrainedTokenizerFast,
    kept_ids: torch.Tensor | Sequence[int],
    lines: Iterable[str],
) -> PrunedAgreement:
    """Hold `pruned` to the contract of this module on `lines`, special tokens included.

    Args:
        tokenizer: the teacher's.
        pruned: what `prune_tokenizer` made of it.
        kept_ids: (V_k,) integers, those it was made with.
        lines: text; each is tokenized by both.

    Returns:
        How far they agree, over all lines.

    Raises:
        ValueError: a fully kept line is tokenized differently; the message shows the line and both lists of tokens.
    """
    slot_of = {token_id: slot for slot, token_id in enumerate(torch.as_tensor(kept_ids).tolist())}
    model = read_spec(tokenizer)["model"]
    hiding_id = unk_id(model) if model["type"] == "WordPiece" else None

    counts = Counter({field.name: 0 for field in fields(PrunedAgreement)})
    for line in lines:
        teacher = tokenizer(line, return_offsets_mapping=True, verbose=False)
        student = pruned(line, return_offsets_mapping=True, verbose=False)
        expected = [slot_of.get(token_id) for token_id in teacher["input_ids"]]
        equal = expected == student["input_ids"]
        fully_kept = None not in expected and hiding_id not in teacher["input_ids"]
        if fully_kept and not equal:
            raise ValueError(
                f"The pruned tokenizer breaks its contract on the line {line!r}: every token of "
                f"{tokenizer.convert_ids_to_tokens(teacher['input_ids'])} is kept, but it gives "
                f"{pruned.convert_ids_to_tokens(student['input_ids'])}. Prune this tokenizer with these kept_ids again, "
                "and pass a tokenizer whose output is deterministic (no BPE dropout)."
            )
        placed = Counter(zip(teacher["offset_mapping"], expected, strict=True))
        placed &= Counter(zip(student["offset_mapping"], student["input_ids"], strict=True))
        counts.update(
            lines=1,
            lines_fully_kept=fully_kept,
            lines_equal=equal,
            tokens=len(expected),
            tokens_equal=placed.total(),
        )
    return PrunedAgreement(**counts)


# --- what must be kept


def _protected_ids(tokenizer: PreTrainedTokenizerBase, spec: Spec, rows: int | None) -> set[int]:
    vocab = tokenizer.get_vocab()
    special_tokens = tokenizer.all_special_tokens
    if absent := [token for token in special_tokens if token not in vocab]:
        raise ValueError(
            f"The tokenizer's special tokens {absent} are not in its vocabulary; add them with "
            "tokenizer.add_special_tokens(...) (and resize the model's embedding) before pruning."
        )
    protected = {vocab[token] for token in special_tokens} | {token["id"] for token in spec["added_tokens"]}
    if rows is not None:
        roles = {getattr(tokenizer, role) for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
        protected = {number for number in protected if number < rows} | {vocab[token] for token in roles & vocab.keys()}
    protected.update(holder[key] for holder, key in inserted_id_fields(spec))

    model = spec["model"]
    if (unknown := unk_id(model)) is not None:
        protected.add(unknown)
    if model.get("byte_fallback"):
        protected.update(vocab[token] for byte in range(256) if (token := f"<0x{byte:02X}>") in vocab)
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        protected.add(scores.index(min(scores)))
    if model["type"] != "WordLevel":
        protected.update(vocab[token] for token in _spelling_tokens(spec))
    return protected


def _spelling_tokens(spec: Spec) -> Iterator[str]:
    """The single-character tokens that `protected_ids` promises to keep."""
    model = spec["model"]
    byte_level = '"type": "ByteLevel"' in json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
    silent = unk_id(model) is None and not model.get("byte_fallback")
    every_character = model["type"] == "BPE" and (byte_level or silent)

    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    for token in model_tokens(model):
        character = token.removeprefix(prefix).removesuffix(suffix)
        if character in _SPELLING or (every_character and len(character) == 1):
            yield token


def _ids_of_words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[int]:
    """The ids that keep every text whole, as `protected_ids` says; one line in the log for each kind of text that is no token."""
    found: set[int] = set()
    several, unknown = [], []
    for text in texts:
        stem = text.strip()
        forms = [
            tokenizer(form, add_special_tokens=False)["input_ids"]
            for form in (text, f" {stem}", stem, stem.lower(), f" {stem.lower()}")
        ]
        ids = {form[0] for form in forms if len(form) == 1}
        if not any(len(form) == 1 for form in forms[:3]):  # not a token as it is written
            ids |= {*forms[0], *forms[1]}
            several += [f"{text!r} ({' '.join(tokenizer.convert_ids_to_tokens(forms[0]))})"] if ids else []
        if ids == {tokenizer.unk_token_id}:
            unknown.append(text)
        found |= ids
    if several:
        log.info("These words are several tokens, all of which are kept: %s.", ", ".join(several))
    if unknown:
        log.warning("The tokenizer has no tokens for %s, so nothing keeps them.", ", ".join(map(repr, unknown)))
    return found


# --- writing the pruned backend


def _check_kept_ids(
    kept_ids: torch.Tensor | Sequence[int],
    token_of: dict[int, str],
    protected: set[int],
    requirements: dict[int, tuple[int, ...]],
) -> list[int]:
    ids = torch.as_tensor(kept_ids)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"kept_ids must be a vector of integer ids, got shape {tuple(ids.shape)} of {ids.dtype}.")
    kept: list[int] = ids.tolist()
    unique = set(kept)
    if len(unique) != len(kept):
        repeated, times = Counter(kept).most_common(1)[0]
        raise ValueError(f"kept_ids holds id {repeated} {times} times; every kept id needs one slot of its own.")
    if unknown := sorted(unique - token_of.keys()):
        raise ValueError(
            f"kept_ids holds id {unknown[0]}, which names no token of this tokenizer ({len(token_of)} tokens); rows that only "
            "pad the embedding cannot be kept."
        )
    if missing := sorted(protected - unique):
        raise ValueError(
            f"kept_ids misses {len(missing)} protected ids, first {missing[0]} ({token_of[missing[0]]!r}); pass "
            "protected_ids(tokenizer) as the protected ids when choosing what to keep."
        )
    for token_id in kept:
        for parent in requirements.get(token_id, ()):
            if parent not in unique:
                raise ValueError(
                    f"kept_ids holds {token_id} ({token_of[token_id]!r}) but not {parent} ({token_of[parent]!r}), from which "
                    "BPE builds it; pass token_requirements(tokenizer) as `requires` when choosing what to keep."
                )
    return kept


def _check_order_of_equal_tokens(kept: list[int], token_of: dict[int, str], vocab: dict[str, int]) -> None:
    """Refuse slots that would change which of a Unigram piece's ids its text gets: the last one, as everywhere in that format."""
    last = {token_of[token_id]: token_id for token_id in kept}
    for token_id in kept:
        token = token_of[token_id]
        if token_id == vocab[token] != last[token]:
            raise ValueError(
                f"Ids {last[token]} and {token_id} are both {token!r}, whose text gets the last one, {token_id}, and kept_ids gives it "
                "the lower slot; exchange the two."
            )


def _open(tokenizer: PreTrainedTokenizerBase, spec: Spec, dropped: Sequence[str]) -> PreTrainedTokenizerFast:
    """`tokenizer` with the backend `spec`, by way of its saved files: what is returned is what will be opened later. Its settings no
    longer name the `dropped` added tokens."""
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        Path(directory, "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        config_file = Path(directory, "tokenizer_config.json")
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for stale in ("auto_map", "vocab", "merges"):
            config.pop(stale, None)
        # Class attributes of a subclass, which the plain class has to be told.
        for name in ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
            config[name] = getattr(tokenizer, name)
        config = _without(config, dropped)
        config_file.write_text(json.dumps(config), encoding="utf-8")
        pruned: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(directory)
    pruned.name_or_path = tokenizer.name_or_path
    return pruned


def _without(value: Any, tokens: Sequence[str]) -> Any:
    """A value of a JSON file without what names one of these tokens."""
    if isinstance(value, dict):
        return {key: _without(each, tokens) for key, each in value.items() if not _names(each, tokens)}
    return [_without(each, tokens) for each in value if not _names(each, tokens)] if isinstance(value, list) else value


def _names(value: Any, tokens: Sequence[str]) -> bool:
    return (value.get("content") if isinstance(value, dict) else value) in tokens
