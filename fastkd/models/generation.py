"""Text that a decoder continues, as it comes: with the tokenizer's ids in and out, whatever vocabulary the model keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TextStreamer

from .load import check_row_length, load_frozen, load_tokenizer


def continue_text(
    name_or_path: str,
    prompt: str,
    show: Callable[[str], object],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    use_cpu: bool = False,
) -> None:
    """Continue `prompt` by transformers' `generate`, until the model ends it or the new tokens are as many as they may be.

    Args:
        name_or_path: a decoder's folder or hub name; a student with its vocabulary map too.
        prompt: text of at least one token.
        show: called with the prompt and what follows it, a few words at a time.
        max_new_tokens: the most tokens behind the prompt.
        temperature: of sampling; 0: the likeliest token each time.
        seed: of sampling.
        use_cpu: stay on the CPU even where there is a GPU.

    Raises:
        ValueError: an encoder, an empty prompt, more tokens than the model has positions, or a temperature below 0.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be a finite number >= 0, and 0 takes the likeliest token each time.")
    model, tokenizer = load_frozen(name_or_path), load_tokenizer(name_or_path)
    if not model.causal:
        raise ValueError(f"The model {name_or_path} is an encoder, which fills in masked tokens and continues no text; give a decoder.")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise ValueError("The prompt has no token to begin with; give some text.")
    check_row_length(model, ids.shape[1] + max_new_tokens, "model", "--max_new_tokens, or shorten the prompt")
    model.to("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    ids = ids.to(model.device)

    class Shown(TextStreamer):
        """Hands over what is whole of the text; the prompt comes as it was given, not as a kept vocabulary reads it."""

        seen = False

        def put(self, value: Tensor) -> None:
            super().put(model.to_ids(value) if self.seen else ids)  # type: ignore[no-untyped-call]
            self.seen = True

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = Shown(tokenizer, skip_special_tokens=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
