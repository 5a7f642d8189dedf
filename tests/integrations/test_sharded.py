"""`generate` and accelerate's loop, with weights sharded over two processes, equal one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

import lorasc_fx as lx
from lorasc_fx.integrations.transformers import CascadeCallback
from lorasc_fx.parallel import fsdp
from lorasc_fx.shards import full_tensor
from tests.integrations.kit import adapted, arguments, llama, rows
from tests.integrations.test_processes import BATCH, SPEC, as_torchrun, by_accelerate, free_port
from tests.kit.errors import raises
from tests.parallel.ranks import on_ranks
from tests.parallel.sharding import Peak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

LIMIT = 500.0
"""Seconds; a Trainer is slow to import."""


def on_a_gpu() -> Any:
    """Make accelerate use its FSDP plugin on the CPU; normally it needs an accelerator."""
    real = AcceleratorState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        if (plugin := options.get("fsdp_plugin")) is not None:
            self.fsdp_plugin = plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return mock.patch.object(AcceleratorState, "__init__", init)


def slow_weights(cascade: lx.Cascade) -> dict[str, Tensor]:
    with cascade.weights("slow"):
        return {name: full_tensor(each.detach()).clone() for name, each in cascade.model.named_parameters()}


PROMPTS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def prompt(rank: int) -> Tensor:
    """Of another length on each rank, which so ask for weights another number of times."""
    return PROMPTS[:, : 3 + 4 * rank]


def sampled(cascade: lx.Cascade, ids: Tensor, **how: Any) -> Tensor:
    return cascade.generate(ids, max_length=12, do_sample=False, pad_token_id=0, **how)  # type: ignore[no-any-return]


def generated(rank: int, count: int) -> dict[str, Tensor]:
    """Tokens before the first call, after a stage of training with the fast and the slow weights, and of a call in
    inference mode; each rank of several has its own prompt.
    """
    model = llama(use_cache=True, num_hidden_layers=4)
    spec = lx.CascadeSpec(rank=2, lora_alpha=6.0, noise=lx.Noise(0.1))
    cascade = lx.adapt(model, kwargs={"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS)}, spec=spec)
    whole = sum(each.numel() * each.itemsize for each in cascade.parameters())
    if count > 1:
        fsdp.shard(cascade)
    ranks = (rank,) if count > 1 else (0, 1)
    found = {f"{each}/before": sampled(cascade, prompt(each)) for each in ranks}
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    for _ in cascade.stages(2, optimizer):
        for _ in range(3):
            cascade(input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), labels=PROMPTS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for each in ranks:
                found[f"{each}/fast"] = sampled(cascade, prompt(each))
                with cascade.weights("slow"):
                    found[f"{each}/slow"] = sampled(cascade, prompt(each), use_cache=False)
                with torch.inference_mode():
                    found[f"{each}/in inference mode"] = sampled(cascade, prompt(each)).clone()
    if count > 1:
        with Peak(cascade) as peak:
            sampled(cascade, prompt(rank))
        assert 0 < peak.most < whole / 2, (peak.most, whole)  # a layer, embedding and head
        held = [dict(vars(module)) for module in cascade.modules()]
        with pytest.raises(ZeroDivisionError):
            sampled(cascade, prompt(rank), logits_processor=[lambda *_: 1 / 0])
        assert all(hasattr(each, "to_local") for each in cascade.parameters())
        assert [set(vars(module)) for module in cascade.modules()] == [set(each) for each in held]
        with pytest.raises(RuntimeError, match="and DTensor"):  # of torch
            cascade.model(PROMPTS)
    return found


def test_generate_gives_the_tokens_of_one_process() -> None:
    (one,) = on_ranks(1, generated)
    for rank, found in enumerate(on_ranks(2, generated, limit=LIMIT)):
        assert found.keys() == {name for name in one if name.startswith(f"{rank}/")}
        for name, tokens in found.items():
            assert torch.equal(tokens, one[name]), name
    assert not torch.equal(one["0/before"], one["0/fast"])


# ---- accelerate


def looped(rank: int, count: int, port: int, folder: str) -> dict[str, Tensor]:
    """`by_accelerate` on shards: accumulated over two batches, clipped; saved by lx.save."""
    as_torchrun(rank, count, port)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    cascade = fsdp.shard(adapted(SPEC, 0.0, torch.float64))
    data = [{"x": row["x"], "labels": row["labels"]} for row in rows(16, torch.float64)]
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    assert accelerator.prepare_model(cascade, evaluation_mode=True) is cascade
    optimizer, loader = accelerator.prepare(optimizer, DataLoader(data, BATCH // count))  # type: ignore[arg-type]
    for stage in cascade.stages(3, optimizer):
        for batch in loader:
            with accelerator.accumulate(cascade):
                accelerator.backward(cascade(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(cascade.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        if stage.number == 2:
            before = slow_weights(cascade)
            with raises(lx.StateError, "sharded", "state_dict", "lorasc_fx.save"):
                accelerator.save_state(f"{folder}/state")
            assert not list(Path(folder, "state").iterdir())
            if rank == 0:
                Path(folder, "other").mkdir()
                whole = adapted(SPEC, 0.0, torch.float64).state_dict()
                accelerate.utils.save(whole, f"{folder}/other/model.safetensors", safe_serialization=True)
            dist.barrier()
            with raises(lx.StateError, "sharded", "state_dict", "lorasc_fx.save"):
                accelerator.load_state(f"{folder}/other")
            after = slow_weights(cascade)
            assert all(torch.equal(after[name], value) for name, value in before.items())
            lx.save(cascade, f"{folder}/run", optimizer=optimizer)
    return slow_weights(cascade)


def test_a_loop_with_accelerate(tmp_path: Path) -> None:
    (one,) = on_ranks(1, by_accelerate, free_port(), str(tmp_path), SPEC, 0, group=False, limit=LIMIT)
    for found in on_ranks(2, looped, free_port(), str(tmp_path), group=False, limit=LIMIT):
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, atol=1e-10, rtol=0)


def refused(rank: int, count: int, port: int, folder: str) -> None:
    """A Trainer and accelerate's plugin raise one error each, before anything is changed."""
    as_torchrun(rank, count, port)
    PartialState(cpu=True)  # which makes the process group
    cascade = fsdp.shard(adapted(SPEC, 0.0, torch.float64))
    with raises(lx.SpecError, "trainer-not-supported", "sharded", "parallel.fsdp.shard"):
        Trainer(model=cascade, args=arguments(Path(folder)), callbacks=[CascadeCallback(cascade)])
    with on_a_gpu(), mock.patch.dict("os.environ", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}):
        cascade = adapted(SPEC, 0.0, torch.float64)  # as `accelerate launch --use_fsdp` starts it
        with raises(lx.SpecError, "trainer-not-supported", "fsdp", "DistributedDataParallel"):
            Trainer(model=cascade, args=arguments(Path(folder)), callbacks=[CascadeCallback(cascade)])


def test_sharding_by_other_libraries_is_refused(tmp_path: Path) -> None:
    on_ranks(2, refused, free_port(), str(tmp_path), group=False, limit=LIMIT)
