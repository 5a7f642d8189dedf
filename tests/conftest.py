"""What holds for every test: one thread a worker, no network, one hypothesis profile."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere. Two workers with two threads each would be slower on two cores, and one thread sums
# in one order. The workers of xdist inherit this.
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
# Torch caches what an op does to fake tensors, which pays where many layers are alike. In a model of a few ops, to fill
# the cache is a fifth of an export. Processes that tests start inherit this too.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
# A test that would download is a test that fails here, at once and by name.
os.environ["HF_HUB_OFFLINE"] = "1"
# What a machine was measured to do belongs to its user, not to a test.
os.environ["LORASC_FX_CACHE"] = os.path.join(tempfile.mkdtemp(prefix="lorasc-fx-"), "rates.json")

import pytest
from hypothesis import HealthCheck, settings

# The first example pays for torch's imports and kernels; pytest-timeout watches the whole.
settings.register_profile(
    "lorasc", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lorasc")

# Collections as rare as by default take a tenth of the time; so rare, next to none.
gc.set_threshold(2_000, 20, 50)

# A test waits for no disk: what a process wrote is there for the next one, and only a machine that dies would lose it.
os.fsync = lambda handle: None

USAGE = (
    "the model of a cascade was called inside",
    "the state dict of a cascade's model was read inside",
    "the cascade was called in eval mode inside",
    r"stage \d+ ended, and no branch has moved",
    r"\S+ stage 1 has trained and is folded now",
    r"\d+ sites came with a call",
    r"\S+ stage \d+ has trained and never ended",
    ".* requires_grad was False while that of most weights",
)
"""Warnings about the use of a cascade. Tests of numerics look inside a stage, and end it, at moments at which a program
has no reason to; what stands for programs (`AS_PROGRAMS`) has to be free of these warnings."""
AS_PROGRAMS = ("loops", "cli", "contract")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from torch._dynamo import guards

    # For its logs, dynamo measures the guards of each frame that it compiles, on emptied processor caches: 20 ms.
    guards.profile_guard_manager = lambda *_: 0.0
    gc.freeze()  # what imports have made, half a million objects, is no garbage
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.relative_to(here).parts[0] not in AS_PROGRAMS:
            for message in USAGE:
                item.add_marker(
                    pytest.mark.filterwarnings(f"ignore:{message}:lorasc_fx.errors.LorascWarning"), append=False
                )


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo keeps what it compiled by code object, and counts: a test starts without, and leaves nothing compiled."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
