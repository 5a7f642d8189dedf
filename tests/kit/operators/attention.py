"""Attention: torch's own layers in every setting, and the function itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasc_fx.plan import Reason
from tests.kit.operators.case import Case, linear, of, rand, row

SEQUENCE = rand((3, 4, 6))


class Attends(nn.Module):
    """nn.MultiheadAttention with options of the constructor and of the call."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(6, 2, **options), call

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, **self.call)


class Crosses(Attends):
    def forward(self, x: Tensor, memory: Tensor, values: Tensor, mask: Tensor | None = None) -> Any:
        return self.attention(x, memory, values, key_padding_mask=mask, **self.call)


def attends(*, cross: bool = False, call: dict[str, Any] | None = None, **options: Any) -> Callable[[], nn.Module]:
    return lambda: (Crosses if cross else Attends)(call or {}, **options)


def padding() -> Tensor:
    return torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])


PACKED = linear("attention.in_proj_weight", "attention.out_proj.weight")
APART = linear(*(f"attention.{name}_weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj.x")))
APART = {name.replace("out_proj.x_weight", "out_proj.weight"): kind for name, kind in APART.items()}


def told(sites: dict[str, str]) -> str:
    """Return the sites as uses of one linear each, in this order."""
    nodes = ["linear", *(f"linear_{number}" for number in range(1, len(sites)))]
    return " ".join(f"{name}={node}" for name, node in zip(sites, nodes, strict=True))


CAUSAL = torch.triu(torch.full((4, 4), float("-inf"), dtype=torch.float64), 1)
DROPS = {"dropout": 0.3}


def attention(name: str, build: Any, inputs: Any, sites: dict[str, str] | None = None, **more: Any) -> Case:
    return row(name, build, inputs, PACKED if sites is None else sites, **more)


def layer_sites(*prefixes: str, cross: bool = False) -> dict[str, str]:
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    names += ["multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight"] if cross else []
    return linear(*(f"{prefix}{name}" for prefix in prefixes for name in names))


def encoder(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(6, 2, 10, **options)


def _called(x: Tensor, packed: Tensor, out: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return F.multi_head_attention_forward(x, x, x, 6, 2, packed, None, None, None, False, 0.0, out, None)[0]


# fmt: off
ATTENTION = [
    attention("mha", attends(batch_first=True, **DROPS), SEQUENCE),
    attention("mha_length_first", attends(call={"need_weights": False}), SEQUENCE, aten=told(PACKED)),
    attention("mha_heads", attends(call={"average_attn_weights": False}, batch_first=True, bias=False), SEQUENCE),
    attention("mha_causal", attends(call={"attn_mask": CAUSAL, "need_weights": False}, batch_first=True), SEQUENCE),
    attention("mha_is_causal",
        attends(call={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, batch_first=True), SEQUENCE),
    attention("mha_padded", attends(cross=True, batch_first=True),
        lambda: (*(torch.randn(3, 4, 6, dtype=torch.float64) for _ in range(3)), padding())),
    attention("mha_unbatched", attends(), rand((4, 6))),
    attention("mha_more_keys", attends(add_bias_kv=True, add_zero_attn=True, batch_first=True), SEQUENCE,
        refused=dict.fromkeys(("attention.bias_k", "attention.bias_v"), (Reason.NO_FORM, Reason.VECTOR))),
    attention("mha_cross", attends(cross=True, batch_first=True), rand((3, 4, 6), (3, 5, 6), (3, 5, 6))),
    attention("mha_kdim", attends(cross=True, batch_first=True, kdim=5, vdim=7, call={"need_weights": False}),
        rand((3, 4, 6), (3, 2, 5), (3, 2, 7)), APART, aten=told(APART)),
    attention("mha_kdim_weights", attends(cross=True, kdim=5, vdim=7, **DROPS), rand((4, 3, 6), (2, 3, 5), (2, 3, 7)),
        APART),
    Case("mha_function", of(_called, (18, 6), (6, 6)), SEQUENCE, linear("w0", "w1")),
    attention("encoder_layer", encoder(batch_first=True), SEQUENCE, layer_sites(""), aten=told(layer_sites("")),
        exact=False),
    attention("encoder_layer_first", encoder(norm_first=True, activation="gelu"), SEQUENCE, layer_sites("")),
    attention("encoder_layer_masks", encoder(batch_first=True, bias=False),
        lambda: (SEQUENCE(), {"src_mask": CAUSAL.isinf(), "src_key_padding_mask": padding()}), layer_sites("")),
    attention("encoder", lambda: nn.TransformerEncoder(encoder(batch_first=True)(), 2),
        lambda: (SEQUENCE(), {"src_key_padding_mask": padding()}), layer_sites("layers.0.", "layers.1.")),
    attention("decoder_layer", lambda: nn.TransformerDecoderLayer(6, 2, 10, batch_first=True),
        lambda: (rand((3, 4, 6), (3, 5, 6))(), {"tgt_mask": CAUSAL}), layer_sites("", cross=True)),
    attention("transformer", lambda: nn.Transformer(6, 2, 1, 1, 10, batch_first=True), rand((3, 5, 6), (3, 4, 6)),
        layer_sites("encoder.layers.0.") | layer_sites("decoder.layers.0.", cross=True)),
]
# fmt: on
