import time
from types import SimpleNamespace

import pytest

from services.worker.leases import Leases


def test_slices_that_run_together_share_their_device():
    leases = Leases()
    began = time.monotonic()
    with leases.hold(SimpleNamespace(lease_token=1)) as first:
        time.sleep(0.1)
        with leases.hold(SimpleNamespace(lease_token=2)) as second:
            time.sleep(0.2)
            shares = leases.device_seconds(first), leases.device_seconds(second)
    assert shares[0] == pytest.approx(0.2, abs=0.05) and shares[1] == pytest.approx(0.1, abs=0.05)
    # What all are charged is what went by, not a multiple of it.
    assert first.device_seconds + second.device_seconds <= time.monotonic() - began
    time.sleep(0.05)
    assert first.device_seconds == pytest.approx(shares[0], abs=0.02)  # an ended lease costs nothing more
