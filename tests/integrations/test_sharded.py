"""The Trainer with `fsdp`, and accelerate's loop, on shards of two processes: the numbers of one process."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import (
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

import lorasc_fx as lx
from lorasc_fx.integrations.transformers import CascadeCallback
from lorasc_fx.parallel import fsdp
from lorasc_fx.shards import full_tensor
from tests.integrations.kit import adapted, arguments, llama, net, rows, texts
from tests.integrations.test_processes import BATCH, FAST, SPEC, as_torchrun, by_accelerate, free_port
from tests.kit.errors import raises
from tests.parallel.ranks import on_ranks
from tests.parallel.sharding import Peak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SPECS = {"noise": SPEC, "fast": FAST}
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}
LIMIT = 500.0
"""Seconds; a Trainer is slow to import."""


def on_a_gpu() -> Any:
    """Let accelerate take its FSDP plugin, which it does on accelerators alone."""
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


def logged(trainer: Trainer) -> dict[str, Tensor]:
    names = ("loss", "grad_norm", "eval_loss", "learning_rate")
    return {
        f"log/{index}/{name}": torch.tensor(float(entry[name]))
        for index, entry in enumerate(trainer.state.log_history)
        for name in names
        if name in entry
    }


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str = "") -> None:
    """Weights to 1e-10; what a Trainer logs is of fp32."""
    assert {name for name in found if name.startswith(prefix)} == {prefix + name for name in wanted}
    for name, value in wanted.items():
        atol = 2e-6 if "log/" in name else 1e-10
        torch.testing.assert_close(
            found[prefix + name], value, atol=atol, rtol=0, msg=lambda text, at=name: f"{at}: {text}"
        )


# ---- a small network: numbers, checkpoints


class Stop(TrainerCallback):  # type: ignore[misc]
    """Stops a training after so many steps, of which its scheduler knows nothing."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        control.should_training_stop |= state.global_step == self.after


def trained(count: int, folder: str, spec: lx.CascadeSpec, stop: int = 0, **how: Any) -> dict[str, Tensor]:
    """Train three epochs, and go on from what there is in the folder; `stop` ends it after so many steps."""
    cascade = adapted(spec, 0.0).double()  # the graphs are those of another dtype, and are dropped
    sizes = {"per_device_train_batch_size": BATCH // count, "per_device_eval_batch_size": BATCH // count}
    trainer = Trainer(
        model=cascade,
        args=arguments(
            Path(folder), num_train_epochs=3, save_strategy="steps", save_steps=3, eval_strategy="epoch",
            max_grad_norm=0.8, lr_scheduler_type="linear", **sizes, **how,
        ),
        train_dataset=rows(16, torch.float64),
        eval_dataset=rows(8, torch.float64),
        callbacks=[CascadeCallback(cascade, epochs=1), Stop(stop)],
    )  # fmt: skip
    assert all(hasattr(each, "to_local") for each in cascade.parameters()) == bool(how)
    assert not trainer.is_fsdp_enabled
    there = any(Path(folder).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=there or None)
    trainer.save_model(f"{folder}/saved")
    steps = sorted(int(path.name.partition("-")[2]) for path in Path(folder).glob("checkpoint-*"))
    found = {"stage": torch.tensor(cascade.stage), "steps": torch.tensor(steps)}
    if dist.is_initialized():
        dist.barrier()  # the first process has written
    saved = {f"saved/{name}": value for name, value in load_file(f"{folder}/saved/model.safetensors").items()}
    return found | slow_weights(cascade) | logged(trainer) | saved


def alone(rank: int, count: int, port: int, folder: str, halves: str) -> dict[str, Tensor]:
    """On one process: the whole training, and the rest of one that two have begun."""
    as_torchrun(rank, count, port)
    found = {}
    for name, spec in SPECS.items():
        whole = trained(1, f"{folder}/{name}", spec)
        found |= {f"{name}/{key}": value for key, value in whole.items()}
    return found | {f"rest/{key}": value for key, value in trained(1, halves, SPEC).items()}


def together(rank: int, count: int, port: int, folder: str) -> dict[str, Tensor]:
    """On two: the whole training; one that is stopped in the second stage, gone on with on shards and without; and one
    whose accelerator has the plugin, as on GPUs.
    """
    as_torchrun(rank, count, port)
    found = {}
    for name, spec in SPECS.items():
        whole = trained(count, f"{folder}/{name}", spec, **FSDP)
        found |= {f"{name}/{key}": value for key, value in whole.items()}
    trained(count, f"{folder}/half", SPEC, 6, **FSDP)
    written = sorted(
        path.name for path in Path(folder, "half", "checkpoint-6", "cascade", "version-00000001").iterdir()
    )
    assert written == ["manifest.json", *(f"state-0000{part}-of-00002.safetensors" for part in (1, 2))]
    assert not list(Path(folder, "half", "checkpoint-6").glob("*.safetensors"))
    if rank == 0:
        for name in ("sharded", "replicated", "alone"):
            shutil.copytree(f"{folder}/half", f"{folder}/{name}")
    dist.barrier()
    for name, how in (("sharded", FSDP), ("replicated", {})):
        found |= {f"{name}/{key}": value for key, value in trained(count, f"{folder}/{name}", SPEC, **how).items()}
    with on_a_gpu():
        found |= {f"gpu/{key}": value for key, value in trained(count, f"{folder}/gpu", SPEC, **FSDP).items()}
    return found


def test_the_numbers_and_checkpoints_of_one_process(tmp_path: Path) -> None:
    both = on_ranks(2, together, free_port(), str(tmp_path / "two"), group=False, limit=2 * LIMIT)
    halves = str(tmp_path / "two" / "alone")
    (one,) = on_ranks(1, alone, free_port(), str(tmp_path / "one"), halves, group=False, limit=LIMIT)
    base = net(0.0).state_dict()
    wanted = {
        name: {key.removeprefix(f"{name}/"): value for key, value in one.items() if key.startswith(f"{name}/")}
        for name in SPECS
    }
    for table in wanted.values():
        assert all((table[name] - value).abs().max() > 1e-3 for name, value in base.items() if value.dim() > 1)
        assert all(torch.equal(table[f"saved/{name}"], table[name]) for name in base)
    for found in both:
        for name in SPECS:
            close(found, wanted[name], f"{name}/")
        for name in ("sharded", "replicated"):
            close(found, wanted["noise"], f"{name}/")
        close(found, wanted["noise"], "gpu/")
    close(one, wanted["noise"], "rest/")


def autocast(rank: int, count: int, port: int, folder: str) -> dict[str, Tensor]:
    """In fp32, in bf16, and so on shards."""
    as_torchrun(rank, count, port)
    found = {}
    for name, how in (("fp32", {}), ("bf16", {"bf16": True}), ("shards", {"bf16": True, **FSDP})):
        cascade = adapted(SPEC, 0.0)
        args = arguments(Path(folder), **how)
        Trainer(model=cascade, args=args, train_dataset=rows(16), callbacks=[CascadeCallback(cascade)]).train()
        assert hasattr(next(cascade.parameters()), "to_local") == (name == "shards")
        found |= {f"{name}/{key}": value for key, value in slow_weights(cascade).items()}
    return found


def test_autocast_is_that_of_whole_weights(tmp_path: Path) -> None:
    (found,) = on_ranks(1, autocast, free_port(), str(tmp_path), group=False, limit=LIMIT)
    for name in ("first.weight", "head.weight", "head.bias"):
        assert torch.equal(found[f"shards/{name}"], found[f"bf16/{name}"])
        assert not torch.equal(found[f"fp32/{name}"], found[f"bf16/{name}"])


# ---- a language model


def language(rank: int, count: int, port: int, folder: str) -> dict[str, Tensor]:
    """Rows of several lengths, two batches a step, learning rates of the spec, the best model of the middle; sharded
    before the Trainer is made, as its optimizer has to be.
    """
    as_torchrun(rank, count, port)
    batch = {name: torch.stack([row[name] for row in texts(4)]) for name in texts(1)[0]}
    args = arguments(
        Path(folder), per_device_train_batch_size=4 // count, per_device_eval_batch_size=4 // count, max_steps=6,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_slow_loss", save_total_limit=1,
    )  # fmt: skip
    model = llama(tie_word_embeddings=True)
    spec = lx.CascadeSpec(rank=2, lora_alpha=6.0, noise=lx.Noise(0.1), train=("*norm*",), lr_ratio=4.0)
    cascade = lx.adapt(model, kwargs=batch, spec=spec)
    if count > 1:
        fsdp.shard(cascade, init_device_mesh("cpu", (1, count), mesh_dim_names=("replicate", "shard")))
    rate = torch.optim.lr_scheduler.LambdaLR
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.02))
    trainer = Trainer(
        model=cascade, args=args, train_dataset=texts(16), eval_dataset=texts(8),
        callbacks=[CascadeCallback(cascade, steps=2)],
        optimizers=(optimizer, rate(optimizer, lambda step: 1.0 if step < 2 else 50.0)),  # it gets worse then
    )  # fmt: skip
    before = {"log/before": torch.tensor(trainer.evaluate()["eval_loss"], dtype=torch.float32)}
    trainer.train()
    assert trainer.state.best_global_step == 2
    trainer.save_model(f"{folder}/saved")
    if count > 1:
        dist.barrier()
    again = LlamaForCausalLM.from_pretrained(f"{folder}/saved", dtype="auto")
    saved = {f"saved/{name}": value.detach().clone() for name, value in again.named_parameters()}
    return before | slow_weights(cascade) | logged(trainer) | saved


def test_a_language_model_that_was_sharded_before(tmp_path: Path) -> None:
    (one,) = on_ranks(1, language, free_port(), str(tmp_path / "one"), group=False, limit=LIMIT)
    both = on_ranks(2, language, free_port(), str(tmp_path / "two"), group=False, limit=LIMIT)
    base = dict(llama(tie_word_embeddings=True).named_parameters())
    assert all((one[name] - value).abs().max() > 1e-4 for name, value in base.items())
    assert all(torch.equal(one[f"saved/{name}"], one[name]) for name in base)
    assert not any(name in one for name in ("lm_head.weight", "saved/lm_head.weight"))  # tied
    for found in both:
        close(found, one)


# ---- generate, and TRL's trainers

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
        for weights in ("slow", None):
            with (
                cascade.weights(weights) if weights else contextlib.nullcontext(),
                raises(lx.StateError, "sharded", "LlamaForCausalLM", "generate"),
            ):
                cascade.model(PROMPTS)
    return found


def test_generate_has_the_tokens_of_one_process() -> None:
    (one,) = on_ranks(1, generated)
    for rank, found in enumerate(on_ranks(2, generated, limit=LIMIT)):
        assert found.keys() == {name for name in one if name.startswith(f"{rank}/")}
        for name, tokens in found.items():
            assert torch.equal(tokens, one[name]), name
    assert not torch.equal(one["0/before"], one["0/fast"])


def preferred(rank: int, count: int, port: int, folder: str) -> dict[str, Tensor]:
    """TRL's trainers, with `fsdp` where there are several processes."""
    from tests.integrations import test_trl

    warnings.simplefilter("ignore")
    as_torchrun(rank, count, port)
    found = {}
    how: dict[str, Any] = {"per_device_train_batch_size": 4 // count, "per_device_eval_batch_size": 4 // count}
    how |= FSDP if count > 1 else {}
    for name, make in {"sft": test_trl.trainer_of, "dpo": test_trl.dpo_of, "grpo": test_trl.grpo_of}.items():
        cascade = test_trl.adapted(test_trl.NOISY)
        callback = CascadeCallback(cascade)
        more: dict[str, Any] = {"sft": {"eval_strategy": "epoch"}, "dpo": {"ref_model": callback.reference}}.get(
            name, {}
        )
        more = {"top_k": 1, "max_steps": 2} if name == "grpo" else more  # the samples are those of the largest logits
        if count > 1 and name == "sft":
            other = test_trl.adapted(test_trl.NOISY)
            with raises(lx.SpecError, "trainer-not-supported", "gradient_checkpointing=False"):
                make(other, Path(folder), CascadeCallback(other), **how, gradient_checkpointing=True)
        trainer = make(cascade, Path(folder), callback, **how, **more)
        assert all(hasattr(each, "to_local") for each in cascade.parameters()) == (count > 1)
        trainer.train()
        for index, entry in enumerate(trainer.state.log_history):
            for key in ("loss", "rewards/margins", "reward", "completions/mean_length"):
                if key in entry:
                    found[f"{name}/log/{index}/{key}"] = torch.tensor(float(entry[key]))
        found |= {f"{name}/{key}": value for key, value in slow_weights(cascade).items()}
    return found | predicted(count, folder, how)


def predicted(count: int, folder: str, how: dict[str, Any]) -> dict[str, Tensor]:
    """A Trainer that evaluates with `generate`."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = T5ForConditionalGeneration(T5Config(**sizes, **tokens, dropout_rate=0.0, use_cache=False))
    generator = torch.Generator().manual_seed(4)
    data = [
        {name: torch.randint(3, 40, (size,), generator=generator) for name, size in (("input_ids", 7), ("labels", 5))}
        for _ in range(8)
    ]
    batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0]}
    cascade = lx.adapt(model, kwargs=batch, spec=lx.CascadeSpec(rank=2))
    args = Seq2SeqTrainingArguments(
        output_dir=folder, predict_with_generate=True, generation_max_length=8, learning_rate=0.02, report_to=[],
        use_cpu=True, num_train_epochs=2, disable_tqdm=True, save_strategy="no", **how,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=cascade, args=args, train_dataset=data, callbacks=[CascadeCallback(cascade)])
    trainer.train()
    return {"predictions": torch.tensor(trainer.predict(data).predictions)}


def test_the_trainers_of_trl(tmp_path: Path) -> None:
    """In fp32, of which the sums of two processes round in another order; and predictions by `generate`."""
    (one,) = on_ranks(1, preferred, free_port(), str(tmp_path / "one"), group=False, limit=LIMIT)
    for found in on_ranks(2, preferred, free_port(), str(tmp_path / "two"), group=False, limit=LIMIT):
        assert found.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, atol=2e-6, rtol=0, msg=lambda text, at=name: f"{at}: {text}")
    assert any(name.startswith("grpo/log") and name.endswith("reward") for name in one)
    base = dict(llama().float().named_parameters())
    for name in ("sft", "dpo"):
        moved = [(one[f"{name}/{key}"] - value).abs().max() for key, value in base.items() if "proj" in key]
        assert min(moved) > 1e-4


# ---- accelerate


def looped(rank: int, count: int, port: int, folder: str, spec: lx.CascadeSpec, stop: int) -> dict[str, Tensor]:
    """`by_accelerate` on shards: accumulated over two batches, clipped; saved by lx.save."""
    as_torchrun(rank, count, port)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    cascade = fsdp.shard(adapted(spec, 0.0, torch.float64))
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
                whole = adapted(spec, 0.0, torch.float64).state_dict()
                accelerate.utils.save(whole, f"{folder}/other/model.safetensors", safe_serialization=True)
            dist.barrier()
            with raises(lx.StateError, "sharded", "state_dict", "lorasc_fx.save"):
                accelerator.load_state(f"{folder}/other")
            after = slow_weights(cascade)
            assert all(torch.equal(after[name], value) for name, value in before.items())
            lx.save(cascade, f"{folder}/run", optimizer=optimizer)
    return slow_weights(cascade)


def test_a_loop_with_accelerate(tmp_path: Path) -> None:
    folder, name = str(tmp_path), "noise"
    (one,) = on_ranks(1, by_accelerate, free_port(), folder, SPECS[name], 0, group=False, limit=LIMIT)
    for found in on_ranks(2, looped, free_port(), folder, SPECS[name], 0, group=False, limit=LIMIT):
        close(found, one)


def refused(rank: int, count: int, port: int, folder: str) -> None:
    """What neither the Trainer nor accelerate can do on shards: one error each, before anything is changed."""
    as_torchrun(rank, count, port)
    option = "trainer-not-supported"
    data = rows(16, torch.float64)

    def make(cascade: lx.Cascade, *, optimizer: Any = None, **more: Any) -> Trainer:
        args = arguments(Path(folder, "run"), per_device_train_batch_size=BATCH // count, **more)
        callbacks = [CascadeCallback(cascade)]
        return Trainer(model=cascade, args=args, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None))

    cascade = adapted(SPEC, 0.0, torch.float64)
    weights = {name: value.detach().clone() for name, value in cascade.named_parameters()}
    for name in ("torch_compile", "activation_checkpointing"):
        with raises(lx.SpecError, option, name, "True"):
            make(cascade, **{name: True}, **FSDP)
    with raises(lx.SpecError, "conflicting-options", "optimizers", "parallel.fsdp.shard"):
        make(cascade, optimizer=torch.optim.AdamW(cascade.param_groups(lr=0.1)), **FSDP)
    with (
        on_a_gpu(),
        raises(lx.SpecError, option, "reshard_after_forward", "False"),
        mock.patch.dict(
            "os.environ", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
        ),
    ):  # as `accelerate launch --use_fsdp` starts it
        make(cascade)
    for name, value in cascade.named_parameters():
        assert not hasattr(value, "to_local")
        assert torch.equal(value, weights[name])

    make(adapted(SPEC, 0.0, torch.float64), max_steps=2, save_strategy="steps", save_steps=2).train()
    dist.barrier()
    with raises(lx.errors.CheckpointError, "no-checkpoint", "checkpoint-2", "without fsdp"):
        make(cascade, **FSDP).train(resume_from_checkpoint=str(Path(folder, "run", "checkpoint-2")))

    args = arguments(Path(folder, "run"), **FSDP)
    for _ in range(2):  # two Trainers of the same arguments
        with on_a_gpu():
            cascade = adapted(SPEC, 0.0, torch.float64)
            trainer = Trainer(model=cascade, args=args, train_dataset=data, callbacks=[CascadeCallback(cascade)])
        assert not trainer.is_fsdp_enabled
        assert all(hasattr(value, "to_local") for value in cascade.parameters())

    for version in (1, 2):
        AcceleratorState._reset_state(reset_partial_state=True)
        with on_a_gpu():
            accelerator = accelerate.Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=version))
            for sharded in (False, True):
                cascade = adapted(SPEC, 0.0, torch.float64)
                if sharded:
                    fsdp.shard(cascade)
                optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.1))
                held = {id(each) for group in optimizer.param_groups for each in group["params"]}
                with raises(lx.StateError, "wrapper-not-supported", "fsdp_plugin", "prepare_model", "fsdp.shard"):
                    accelerator.prepare(cascade, optimizer)
                assert held == {id(each) for group in optimizer.param_groups for each in group["params"]}
                assert held <= {id(each) for each in cascade.parameters()}
                assert cascade(torch.ones(2, 6, dtype=torch.float64))["logits"].shape == (2, 4)


def test_what_is_refused(tmp_path: Path) -> None:
    on_ranks(2, refused, free_port(), str(tmp_path), group=False, limit=LIMIT)
