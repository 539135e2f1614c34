"""What wraps models in other people's code, with what is public of it."""

from __future__ import annotations

from typing import Any

from torch import nn


class PeftStandIn(nn.Module):
    """What a peft.PeftModel shows of itself: the model inside, its own forward of keywords, and all else as the model has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        self.peft_config = {"default": object()}

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)
