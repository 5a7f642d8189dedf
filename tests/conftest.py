"""What holds for every test: one thread a worker, no network, one hypothesis profile."""

import os
import tempfile

# Before torch is imported anywhere. Two workers with two threads each would be slower on two cores, and one thread sums
# in one order. The workers of xdist inherit this.
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
# A test that would download is a test that fails here, at once and by name.
os.environ["HF_HUB_OFFLINE"] = "1"
# What a machine was measured to do belongs to its user, not to a test.
os.environ["LORASC_FX_CACHE"] = os.path.join(tempfile.mkdtemp(prefix="lorasc-fx-"), "rates.json")

from hypothesis import HealthCheck, settings

# The first example pays for torch's imports and kernels; pytest-timeout watches the whole.
settings.register_profile(
    "lorasc", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lorasc")
