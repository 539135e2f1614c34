"""An encoder student as an ONNX file, held against torch on batches of other shapes. Needs the extra `onnx`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tasks.token_rows import pad_id
from .load import is_decoder, load_config, longest_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ONNX_FILE = "model.onnx"
TOLERANCE = 1e-4
"""The largest relative difference from torch that is right; float32 models come to 1e-6."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED = (2, 12)
_COMPARED = ((1, 5), (3, 160))
"""Rows and tokens. 160 is beyond ModernBERT's window of 128 and DeBERTa's nearest relative positions."""


def check_onnx(name_or_path: str) -> None:
    """Refuse, before any weight is read, a model that cannot be exported, or a machine where the packages are missing or broken."""
    for package in PACKAGES:
        try:
            import_module(package)
        except Exception as error:
            raise ValueError(
                f"ONNX needs {package}, which cannot be imported ({type(error).__name__}: {error}): pip install 'fastkd[onnx]', or "
                "export without it."
            ) from error
    if is_decoder(load_config(name_or_path)):
        raise ValueError(
            f"The model {name_or_path} is a decoder, and ONNX files are made of encoders alone: generation needs a cache that a plain "
            "graph has not. Export it without ONNX."
        )


def export_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, tolerance: float = TOLERANCE) -> float:
    """Write the encoder to `path` and return its relative difference from torch, `onnx_difference`.

    Inputs are those of `tokenizer`'s outputs that the model takes, of shape (batch, sequence), both free; outputs are the model's own:
    `logits`, or `start_logits` and `end_logits`. Dropout is off. Weights above 2 GB are put beside the file, under its name.

    path: in a folder that nobody reads yet, such as `store.new_folder` gives: it is written before it is compared.

    Raises:
        ValueError: the difference is above `tolerance`, or no number.
    """
    model = model.eval()
    with _quiet(), torch.no_grad():
        traced = _batch(model, tokenizer, *_TRACED, generator=torch.Generator().manual_seed(0))
        outputs = list(model(**traced).keys())
        axes = {name: {0: "batch", 1: "sequence"} for name in traced}
        program = torch.onnx.export(
            model, kwargs=traced, dynamo=True, input_names=list(traced), output_names=outputs, dynamic_shapes=axes, verbose=False
        )
        assert program is not None
        _forget_where_it_was_made(program)
        program.save(path)
    difference = onnx_difference(model, tokenizer, path)
    if not difference <= tolerance:
        raise ValueError(
            f"The ONNX file of this {type(model).__name__} differs from torch by {difference:.2g} (relative), and {tolerance:.2g} is "
            "allowed, so it is not kept. Export without ONNX, and please report the model."
        )
    return difference


def onnx_difference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> float:
    """The largest |onnx - torch| / |torch| (2-norms) of any output over random batches of two shapes; values at pads do not count."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    longest = longest_row(model)
    generator = torch.Generator().manual_seed(1)
    differences = []
    for rows, length in _COMPARED:
        batch = _batch(model, tokenizer, rows, length if longest is None else min(length, longest), generator)
        with torch.no_grad():
            expected = model(**batch)
        found = session.run(names, {name: values.numpy() for name, values in batch.items()})
        held = batch["attention_mask"].bool()
        for name, values in zip(names, found, strict=True):
            ours, theirs = torch.from_numpy(values), expected[name]
            if ours.shape[:2] == held.shape:  # one value or more a token
                ours, theirs = ours[held], theirs[held]
            differences.append((ours - theirs).norm() / theirs.norm())
    return float(torch.stack(differences).max())  # of torch, whose max is NaN if any is


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random ids, (rows, length) int64, in rows of unlike lengths of which the first is full."""

    def draw(below: int) -> Tensor:
        return torch.randint(below, (rows, length), generator=generator)

    lengths = 1 + draw(length)[:, :1]
    lengths[0] = length
    held = torch.arange(length) < lengths
    config = model.config.get_text_config()
    ids = draw(config.vocab_size)
    batch = {"input_ids": torch.where(held, ids, pad_id(tokenizer)), "attention_mask": held.long()}
    if "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in signature(model.forward).parameters:
        batch["token_type_ids"] = draw(max(1, getattr(config, "type_vocab_size", 1)))
    return batch


def _forget_where_it_was_made(program: torch.onnx.ONNXProgram) -> None:
    """Drop the stack traces, with paths of this machine, that every node has."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program.model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's dozens of lines on packages that are not there and constants that are not folded."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
