"""Adapt a causal language model: a small byte-level Llama, trained on short reviews and adapted to long ones.

Takes about 20 seconds. Run it from a clone, with the extras `text` and `demo`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorasc_fx as lx
from experiments.data import imdb, rotten_tomatoes

LENGTH = 96


def letters(reviews: list[str]) -> Tensor:
    """Return reviews as bytes, [windows, LENGTH]."""
    text = "\n".join(reviews).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(windows: Tensor, steps: int, seed: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [windows[torch.randint(len(windows), (8,), generator=source)] for _ in range(steps)]


@torch.no_grad()
def loss_of(model: torch.nn.Module, windows: Tensor) -> float:
    return float(model(input_ids=windows, labels=windows).loss)


def main(pretrain: int = 150, steps: int = 60, stages: int = 2) -> tuple[float, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=10,
        eos_token_id=10,
    )
    model = LlamaForCausalLM(config)
    short, long = letters(rotten_tomatoes()[0][:4000]), letters(imdb()[0][:400])
    long, test = long[:-64], long[-64:]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for ids in batches(short, pretrain, seed=0):  # in practice, load a pretrained checkpoint instead
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = loss_of(model, test)

    spec = lx.CascadeSpec(targets=("*.self_attn.*", "*.mlp.*"), rank=8, lora_alpha=16, pace=0.8, noise=lx.Noise(0.05))
    model = lx.adapt(model, kwargs={"input_ids": long[:8], "labels": long[:8]}, spec=spec)
    print(model)
    optimizer = torch.optim.AdamW(model.param_groups(lr=3e-3))
    for stage in model.stages(stages, optimizer):
        for ids in batches(long, steps, seed=stage.index):
            loss = model(input_ids=ids, labels=ids).loss  # the output type of transformers
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"stage {stage.index}: loss {loss.item():.3f}")
    with model.weights("slow"):  # the model's own methods work on the slow weights
        generated = model.generate(long[:1, :32], max_new_tokens=32, do_sample=False)
    print(bytes(generated[0].tolist()).decode(errors="replace"))
    after = loss_of(model.release(), test)
    print(f"loss on long reviews: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
