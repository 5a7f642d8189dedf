"""The models of the benchmark, built from configurations, each with a batch, a loss and the weights to adapt.

The batch of a model whose steps are measured is floating point and needs a gradient: images, or the output of the token
embedding. So every variant computes gradients down to the input, and none computes that of an embedding table.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn


def classes(output: Any) -> torch.Tensor:
    """Return the cross-entropy of logits [..., classes], with class 0 as the label everywhere."""
    logits = output if isinstance(output, torch.Tensor) else output[0]
    rows = logits.flatten(0, -2)
    return F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))


def hidden(output: Any) -> torch.Tensor:
    """Return the mean square of the last hidden state [batch, tokens, width], as a loss."""
    return output[0].square().mean()


@dataclass(frozen=True)
class Work:
    """A model and the input of a step.

    Args:
        build: returns the model in train mode, without dropout.
        batch: returns keyword arguments of forward.
        targets: the spec's targets.
        peft: arguments of peft's LoraConfig that adapt the same weights.
        loss: computes a scalar from the output of forward.
        dropout: whether both libraries support adapter dropout for this model.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    targets: tuple[str, ...]
    peft: Mapping[str, Any]
    loss: Callable[[Any], torch.Tensor] = field(default=classes)
    dropout: bool = True


def _tiny() -> nn.Module:
    conv, fc, head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 8 * 8, 20), nn.Linear(20, 4)
    layers = {"conv": conv, "act": nn.ReLU(), "flat": nn.Flatten(), "fc": fc, "gelu": nn.GELU(), "head": head}
    return nn.Sequential(OrderedDict(layers))


def _images(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=100).train()


def _bert() -> nn.Module:
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForSequenceClassification(config).train()


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return transformers.GPT2LMHeadModel(config).train()


def _llama(layers: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=1000, use_cache=False)
        return transformers.LlamaModel(config).train()

    return build


def _llama_1b() -> nn.Module:
    """Return a Llama with the sizes of TinyLlama (arXiv 2401.02385), in bfloat16."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=22, vocab_size=32000, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return transformers.LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def _smollm2() -> nn.Module:
    """Return a Llama with the sizes of SmolLM2-135M, in fp32."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=30, vocab_size=49152, tie_word_embeddings=True, use_cache=False
    )
    return transformers.LlamaForCausalLM(config).train()


def _mixtral() -> nn.Module:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.MixtralConfig(
        **sizes, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=1000, use_cache=False
    )
    return transformers.MixtralModel(config).train()


def _batch(name: str, *shape: int, scale: float = 1.0) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: torch.randn(*shape) * scale}


_ATTENTION = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj")
_LLAMA = (*_ATTENTION, "*.gate_proj", "*.up_proj", "*.down_proj")
_VIT = {
    "targets": ("*.qkv", "*.attn.proj", "*.fc1", "*.fc2"),
    "peft": {"target_modules": r"(.*\.)?(qkv|attn\.proj|fc1|fc2)"},
}
_DECODER = {"targets": _LLAMA, "peft": {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"}}
_EMBEDDED = _batch("inputs_embeds", 2, 256, 1024, scale=0.02)


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 32000, (2, 32))}


def _named(*works: Work) -> dict[str, Work]:
    return {work.name: work for work in works}


WORKS = _named(
    Work("vit-s", "ViT-S, batch 8, linears", _images("vit_small_patch16_224"), _batch("x", 8, 3, 224, 224), **_VIT),
    Work(
        "bert-base", "BERT-base, 8 x 128, linears of the layers", _bert,
        _batch("inputs_embeds", 8, 128, 768, scale=0.02), ("*.query", "*.key", "*.value", "*.layer.*.dense"),
        {"target_modules": r".*\.layer\..*(query|key|value|dense)"},
    ),
    Work(
        "gpt2", "GPT-2 small, 2 x 256, blocks", _gpt2, _batch("inputs_embeds", 2, 256, 768, scale=0.02),
        ("*.c_attn", "*.c_proj", "*.c_fc"),
        {"target_modules": r".*\.(c_attn|c_proj|c_fc)", "fan_in_fan_out": True},
    ),
    Work(
        "resnet-50", "ResNet-50, batch 4, convs", _images("resnet50"), _batch("x", 4, 3, 224, 224), ("conv",),
        {"target_modules": r"(.*\.)?(conv\d|downsample\.0)"},
    ),
    Work("llama", "Llama-like, 4 layers, 2 x 256", _llama(4), _EMBEDDED, **_DECODER, loss=hidden),
    Work(
        "mixtral", "Mixtral-like, 2 layers, 4 experts, 2 x 256", _mixtral,
        _batch("inputs_embeds", 2, 256, 512, scale=0.02), (*_ATTENTION, "*.experts.*"),
        {
            "target_modules": r".*\.(q|k|v|o)_proj",
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        hidden, dropout=False,  # peft refuses it for parameters
    ),
    Work(
        "tiny", "tiny", _tiny, _batch("input", 8, 3, 8, 8), ("conv", "fc", "head"),
        {"target_modules": ["conv", "fc", "head"]},
    ),
)  # fmt: skip
"""{name: work}. `tiny` is for trying the benchmark itself; the table `calls` has it as a placeholder."""

STARTED = _named(
    Work("vit-b", "ViT-B, linears", _images("vit_base_patch16_224"), _batch("x", 2, 3, 224, 224), **_VIT),
    Work("smollm2-135m", "SmolLM2-135M", _smollm2, _ids, **_DECODER),
    Work("llama-1b", "Llama 1.1B, bf16", _llama_1b, _ids, **_DECODER),
)  # fmt: skip
"""Models whose start is measured. Their steps are not, because they take long on a CPU."""

_STACK = Work("stack", "Llama-like, 2 layers, 2 x 256", _llama(2), _EMBEDDED, **_DECODER, loss=hidden)
COMPILED = {"vit-s": WORKS["vit-s"], "stack": _STACK}
"""Models whose compiled steps are measured. inductor takes at least a minute for each."""


def _on_cuda(work: Work) -> Work:
    """Return the work with model and batch on the GPU, in bfloat16."""
    return replace(
        work,
        build=lambda: work.build().to("cuda", torch.bfloat16),
        batch=lambda: {name: value.to("cuda", torch.bfloat16) for name, value in work.batch().items()},
    )


CUDA = {
    "vit-l": replace(
        STARTED["vit-b"], name="vit-l", title="ViT-L, batch 32, linears",
        build=_images("vit_large_patch16_224"), batch=_batch("x", 32, 3, 224, 224),
    ),
    "llama-1b-cuda": replace(
        STARTED["llama-1b"], name="llama-1b-cuda", title="Llama 1.1B, 4 x 512",
        batch=_batch("inputs_embeds", 4, 512, 2048, scale=0.02),
    ),
}  # fmt: skip
CUDA = {name: _on_cuda(work) for name, work in CUDA.items()}
"""Models whose steps are measured on a GPU."""

MODELS = CUDA | STARTED | COMPILED | WORKS
"""All models, by name."""


def narrow() -> nn.Module:
    """Return a BERT of 12 layers and width 64, without dropout."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertModel(transformers.BertConfig(**sizes, **dropout, vocab_size=100))


def decoder() -> nn.Module:
    """Return a Llama of 8 layers and width 64, in eval mode."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=8, vocab_size=100)).eval()
