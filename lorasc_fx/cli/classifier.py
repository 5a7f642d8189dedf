"""A text classifier on an encoder, frozen batch norms, and the conversion of other libraries' errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lorasc_fx.errors import LorascError, SpecError


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Context manager: convert any error of another library to a SpecError that names the source."""
    try:
        yield
    except LorascError:
        raise
    except Exception as fault:
        cause = fault.__cause__ or fault
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise SpecError(f"{source}: {type(cause).__name__}: {reason}", code="unreadable-file") from fault


def mean_pooled(settings: object) -> Any:
    """Return the class of a text classifier: an encoder, the mean over its unmasked tokens, and a linear head.

    Its state dict has the encoder under the prefix of the library's own classes, so that `AutoModel.from_pretrained`
    opens a saved classifier.
    """

    class MeanPooled(transformers.PreTrainedModel):  # type: ignore[misc]
        """A text classifier with mean pooling."""

        config_class = type(settings)
        base_model_prefix = transformers.MODEL_MAPPING[type(settings)].base_model_prefix

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, transformers.AutoModel.from_config(config))
            self.head = nn.Linear(config.hidden_size, config.num_labels)
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
            """Return the logits [batch, classes] of texts [batch, tokens]."""
            encoder = getattr(self, self.base_model_prefix)
            hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return SequenceClassifierOutput(logits=self.head((hidden * mask).sum(1) / mask.sum(1)))

    return MeanPooled


def freeze_batch_norms(model: nn.Module) -> None:
    """Keep batch norms in eval mode, also when the Trainer sets the model to train mode at each step."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            vars(module)["train"] = lambda mode=True, module=module: module
