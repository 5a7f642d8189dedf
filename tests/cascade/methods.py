"""The delta of each adapter method as a formula of docs/method.md, without lorasc_fx.

A formula takes what is trained, what is fixed in a stage, the weight as a matrix [out, columns], and the scale s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def vera(p: Tensors, fixed: Tensors, _: Tensor, __: float) -> Tensor:
    """diag(b) B diag(d) A."""
    return torch.diag(p["vera_lambda_b"]) @ fixed["B"] @ torch.diag(p["vera_lambda_d"]) @ fixed["A"]


def shira(p: Tensors, fixed: Tensors, weight: Tensor, _: float) -> Tensor:
    """Values at fixed places."""
    flat = torch.zeros(weight.numel(), dtype=torch.float64).index_put((fixed["places"],), p["shira_values"])
    return flat.view_as(weight)


def miss(p: Tensors, _: Tensors, weight: Tensor, __: float) -> Tensor:
    """D[i mod r, o] at output o and input i."""
    rows = torch.arange(weight.shape[1]) % p["miss_block"].shape[0]
    return p["miss_block"][rows].t()


def oft(p: Tensors, _: Tensors, weight: Tensor, __: float) -> Tensor:
    """W (R - I)^T, where R has blocks I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 of skew-symmetric Q."""
    blocks = []
    for entries in p["oft_R"]:
        size = weight.shape[1] // len(p["oft_R"])
        rows, columns = torch.triu_indices(size, size, 1)
        q = torch.zeros(size, size, dtype=torch.float64).index_put((rows, columns), entries)
        q = q - q.t()
        blocks.append(2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return weight @ torch.block_diag(*blocks).t()


def lokr(p: Tensors, _: Tensors, __: Tensor, scale: float) -> Tensor:
    """s w1 (x) w2."""
    w2 = p["lokr_w2"].flatten(1) if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    return scale * torch.kron(p["lokr_w1"], w2)


def delora(p: Tensors, fixed: Tensors, _: Tensor, __: float) -> Tensor:
    """B diag(lambda / (r |a_i| |b_i|)) A diag(w), the norms at least 1e-4."""
    a, b = p["delora_A"], p["delora_B"]
    norms = a.norm(dim=1).clamp_min(1e-4) * b.norm(dim=0).clamp_min(1e-4)
    return b @ torch.diag(p["delora_lambda"] / (len(a) * norms)) @ a @ torch.diag(fixed["w"])


DELTAS: dict[str, Callable[[Tensors, Tensors, Tensor, float], Tensor]] = {
    "lora": lambda p, _, __, scale: scale * p["lora_B"] @ p["lora_A"],
    "lora-xs": lambda p, fixed, _, scale: scale * fixed["B"] @ p["xs_R"] @ fixed["A"],
    "vera": vera,
    "hira": lambda p, _, weight, __: weight * (p["hira_B"] @ p["hira_A"]),
    "shira": shira,
    "miss": miss,
    "oft": oft,
    "lokr": lokr,
    "delora": delora,
}
ZEROS = {
    "lora": "lora_B", "lora-xs": "xs_R", "vera": "vera_lambda_b", "hira": "hira_B", "shira": "shira_values",
    "miss": "miss_block", "oft": "oft_R", "lokr": "lokr_w1", "delora": "delora_B",
}  # fmt: skip
"""What is zero at the start of a stage, so that the delta is."""
