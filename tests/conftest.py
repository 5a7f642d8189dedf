"""What holds for every test: one thread a worker, no network, one hypothesis profile."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before torch is imported anywhere. Two workers with two threads each would be slower on two cores, and one thread sums
# in one order. The workers of xdist inherit this.
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
# Torch caches what an op does to fake tensors, which pays where many layers are alike. In a model of a few ops, to fill
# the cache is a fifth of an export. Processes that tests start inherit this too.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
# A test that would download is a test that fails here, at once and by name.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# The first example pays for torch's imports and kernels; pytest-timeout watches the whole.
settings.register_profile(
    "lorasc", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lorasc")

# Hundreds of processes that tests start import the package: each would compile it anew, and each worker all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Collections as rare as by default take a tenth of the time; so rare, next to none.
gc.set_threshold(2_000, 20, 50)

# A test waits for no disk: what a process wrote is there for the next one, and only a machine that dies would lose it.
os.fsync = lambda handle: None

USAGE = (
    "the model of a cascade was (called|copied|pickled) inside",
    "the state dict of the model of a cascade was read inside",
    "the cascade was called in eval mode inside",
    r"stage \d+ ended, and no branch has moved",
    r"\S+ stage 1 has trained and is folded now",
    r"\d+ sites were added by a call",
    r"\S+ stage \d+ has not ended",
    ".* requires_grad was False, although it was True for most weights",
)
"""Warnings about the use of a cascade. Tests of numerics look inside a stage, and end it, at moments at which a program
has no reason to; what stands for programs (`AS_PROGRAMS`) has to be free of these warnings."""
AS_PROGRAMS = ("integrations", "cli", "contract")
DROPPED = "a cascade was garbage collected without release"
"""Given where a test ends before its model does, or its locals are cleared in that order; tests/errors/test_dropped.py
asks for it."""


SAMPLED = {
    "bank/test_architectures.py::test_operators": 5,
    "checkpoint/test_resume.py::test_after_stages_have_ended": 4,
    "compose/test_inlined.py::test_an_operator": 5,
    "errors/test_all_or_nothing.py::test_a_call_that_fails": 6,
    "checkpoint/test_resume.py::test_bits_for_every_layout": 5,
    "checkpoint/test_resume.py::test_optimizers": 3,
    "checkpoint/test_resume.py::test_three_stages": 6,
    "errors/test_dropped.py::test_lost_training_and_noise": 5,
    "forms/test_calls.py::test_kinds_of_models": 3,
    "forms/test_calls.py::test_outputs_have_the_types_of_the_model": 4,
    "forms/test_forms.py::test_auto": 10,
    "forms/test_forms.py::test_without_a_graph": 7,
    "forms/test_variants.py::test_another_dtype": 4,
    "forms/test_variants.py::test_autocast": 4,
    "forms/test_variants.py::test_containers_of_inputs": 4,
    "integrations/test_attributes.py::test_layers_of_peft_cannot_be_put_into_the_model": 6,
    "integrations/test_attributes.py::test_computing_methods_use_the_fast_weights": 3,
    "spec/test_tokens.py::test_stages_and_a_resume": 7,
    "spec/test_lora_fa.py::test_gradients_of_lora_b_are_those_with_a_trained_lora_a": 2,
    "passes/test_adapter_inputs.py::test_every_method": 4,
    "passes/test_adapter_inputs.py::test_lift": 6,
    "passes/test_fold_branches.py::test_fold": 6,
    "passes/test_fold_branches.py::test_fold_of_a_live_graph_only_erases_nodes": 6,
    "passes/test_insert_branches.py::test_insert": 5,
    "passes/test_insert_branches.py::test_noise_is_in_the_weights_of_a_graph_that_owns_them": 5,
    "passes/test_insert_branches.py::test_gradients_are_those_of_the_formula": 5,
    "passes/test_fold_branches.py::test_transition_is_fold_then_insert": 9,
    "branch/test_functions.py::test_convolutions": 5,
    "branch/test_functions.py::test_narrow_arithmetic": 3,
    "capture/test_eager.py::test_copies_read_their_own_branches": 4,
    "capture/test_eager.py::test_it_computes_the_eager_model_and_with_branches_the_merged_model": 6,
    "check/test_isolation.py::test_adapt_has_no_side_effects": 3,
    "passes/test_attention_masks.py::test_attention_has_the_mask_of_eager_mode": 3,
    "cascade/test_outside_writes.py::test_a_write_from_outside_is_refused": 4,
    "check/test_preflight.py::test_differentiates_in_forward": 2,
    "check/test_preflight.py::test_weights_that_old_hooks_compute_are_one_graph": 3,
    "quantized/test_quantized.py::test_branches_train_beside_layers": 3,
    "cascade/test_recomputed.py::test_gradient_checkpointing_keeps_its_memory": 3,
    "cascade/test_recomputed.py::test_what_backward_runs_again_computes_with_the_branches": 3,
    "passes/test_attention_masks.py::test_outputs_gradients_and_memory_are_those_of_eager": 2,
    "capture/test_small_sizes.py::test_small_sizes_agree_with_the_model": 3,
    "cascade/test_transition_cost.py::test_memory_beside_the_weights": 4,
    "adapt/test_untie.py::test_a_checkpoint_goes_on": 4,
    "accelerator/test_training.py::test_out_of_memory_changes_nothing": 3,
    "accelerator/test_training.py::test_without_fp64": 2,
    "checkpoint/test_damage.py::test_a_resume": 2,
    "checkpoint/test_damage.py::test_a_file": 3,
    "state/test_noise.py::test_a_shard_draws_its_own_numbers": 3,
    "state/test_state.py::test_a_shard_of_the_state_is_the_state_of_the_shard": 4,
    "quantized/test_quantized.py::test_a_run_goes_on": 2,
    "quantized/test_quantized.py::test_a_fold_is_dense_or_requantized": 2,
    "checkpoint/test_write.py::test_folders_of_other_programs_stay": 4,
    "branch/test_functions.py::test_merged_with_a_product": 3,
    "cascade/test_outside_writes.py::test_checksums_are_of_the_bits_in_order": 4,
    "cascade/test_transition_cost.py::test_accumulate_is_the_sum_rounded_once": 4,
    "passes/test_insert_branches.py::test_nodes_and_branches": 3,
    "passes/test_match_sites.py::test_match": 3,
    "branch/test_first_output.py::test_no_output_changes_before_training": 9,
    "branch/test_contract.py::test_stages_follow_the_formula_and_a_resumed_run_has_the_same_bits": 7,
    "state/test_extremes.py::test_a_batch_of_none": 3,
    "branch/test_functions.py::test_a_sparse_lookup_trains_as_a_dense_one": 2,
    "peft/test_dora.py::test_slow_and_fast_weights_are_the_formula": 3,
    "spec/test_grid.py::test_language_models": 2,
    "spec/test_restart_pairs.py::test_a_trajectory_is_that_of_the_formula": 2,
    "peft/test_export.py::test_all_stages_become_one_adapter": 2,
    "peft/test_import.py::test_an_imported_adapter_is_exported_unchanged": 2,
    "peft/test_lora_config.py::test_the_same_weights_as_in_peft_are_adapted": 2,
    "evidence/test_evidence.py::test_every_method_learns_a_sequence": 3,
    "checkpoint/test_damage.py::test_an_edit_is_refused_or_restored": 3,
    "checkpoint/test_write.py::test_a_write_that_fails": 2,
    "capture/test_modes.py::test_a_model_that_branches_on_its_mode": 2,
    "state/test_noise.py::test_nothing_of_the_noise_is_left": 2,
    "export/test_weights.py::test_the_fold_of_a_checkpoint_is_that_of_its_cascade": 2,
}
"""Tests with many rows that together take long: one row of so many is in `make test`, the others are slow."""

SLOW = {
    *(
        f"contract/test_docs.py::test_page_runs[docs/{page}.md]"
        for page in ("adapt", "export", "from-peft", "llm", "method", "passes", "recipes")
    ),
    "cli/test_app.py::test_a_new_process",
    "cli/test_classifiers.py::test_an_encoder_with_mean_pooling",
    "cli/test_compare.py::test_a_diverged_run",
    "cli/test_language.py::test_a_model_learns_to_count[chat]",
    "cli/test_language.py::test_a_model_learns_to_count[pairs]",
    "cli/test_language.py::test_a_model_learns_to_count[plain]",
    "cli/test_language.py::test_the_loss_is_that_of_the_completion[chat]",
    "cli/test_language.py::test_the_loss_is_that_of_the_completion[plain]",
    "cli/test_language.py::test_files_of_a_language_model",
    "cli/test_language.py::test_stop_packing_and_checkpointing",
    "cli/test_train.py::test_options_of_the_trainer",
    "evidence/test_evidence.py::test_exact_match_is_what_greedy_decoding_gives",
    "peft/test_lora_config.py::test_only_parameters_are_targets",
    "forms/test_forms.py::test_the_model_is_its_own_oracle[hf_patchtst]",
    "forms/test_forms.py::test_the_model_is_its_own_oracle[gpt2]",
    "forms/test_forms.py::test_the_model_is_its_own_oracle[mixtral]",
    "forms/test_forms.py::test_the_model_is_its_own_oracle[tv_fcn]",
    "compose/test_table.py::test_before[decompositions]",
    "compose/test_table.py::test_after[decompositions]",
    "compose/test_table.py::test_between[decompositions]",
    "compose/test_table.py::test_inlined[decompositions]",
    "accelerator/test_operations.py::test_exported_graphs",
    "durability/test_kills.py::test_a_training_outlives_a_full_disk",
    "export/test_adapter_inputs.py::test_adapters_are_exchanged_without_lorasc_fx[stated]",
    "export/test_graphs.py::test_onnx_is_the_released_model_of_any_batch[stated]",
}
"""Single rows, and tests, that take long."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/accelerator out unless it alone is asked for: its device stays registered for the whole process."""
    folder = Path(__file__).parent / "accelerator"
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    return (collection_path == folder and not all(path.is_relative_to(folder) for path in asked)) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from torch._dynamo import guards as dynamo_guards

    from lorasc_fx.cascade import cascade

    # For its logs, dynamo measures the guards of each frame that it compiles, on emptied processor caches: 20 ms.
    dynamo_guards.profile_guard_manager = lambda *_: 0.0
    # A cascade that is dropped with what it trained collects garbage, so that it need not warn if its model is garbage
    # too. Most tests end so, and ignore the warning; a collection takes 50 ms.
    cascade.gc = SimpleNamespace(collect=lambda: 0)  # type: ignore[attr-defined]
    gc.freeze()  # what imports have made, half a million objects, is no garbage
    here = Path(__file__).parent
    rows: Counter[str] = Counter()
    for item in items:
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: each worker would have a name of its own for it"
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        if item.nodeid.removeprefix("tests/") in SLOW:
            item.add_marker(pytest.mark.slow)
        if test in SAMPLED and not item.get_closest_marker("slow"):
            if rows[test] % SAMPLED[test]:
                item.add_marker(pytest.mark.slow)
            rows[test] += 1
        if item.path.is_relative_to(here) and item.path.relative_to(here).parts[0] not in AS_PROGRAMS:
            for message in USAGE:
                item.add_marker(
                    pytest.mark.filterwarnings(f"ignore:{message}:lorasc_fx.errors.LorascWarning"), append=False
                )
        item.add_marker(pytest.mark.filterwarnings(f"ignore:{DROPPED}:lorasc_fx.errors.LorascWarning"), append=False)


@pytest.fixture
def captures(caplog: pytest.LogCaptureFixture) -> Any:
    """Count the graphs that were captured after `adapt`, by the log."""
    caplog.set_level("INFO", logger="lorasc_fx")
    return lambda: sum(record.getMessage().startswith("variant ") for record in caplog.records)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo keeps what it compiled by code object, and counts: a test starts without, and leaves nothing compiled."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
