import random
import threading
import time
from types import SimpleNamespace

import pytest

from services.worker.device_time import DeviceTime
from services.worker.leases import Leases


def test_requests_that_are_there_together_share_the_device():
    device = DeviceTime()
    one = device.enter()
    time.sleep(0.1)
    three = device.enter(3)
    time.sleep(0.2)
    assert device.leave(three) == pytest.approx(0.15, abs=0.03)
    time.sleep(0.1)
    assert device.leave(one) == pytest.approx(0.25, abs=0.05)
    time.sleep(0.1)
    assert one.seconds == pytest.approx(0.25, abs=0.05)  # who has left is charged nothing more
    assert device.busy_seconds == pytest.approx(0.4, abs=0.05)


def test_a_share_follows_its_requests():
    device = DeviceTime()
    slice_, call = device.enter(9), device.enter()
    time.sleep(0.2)
    assert device.charged(slice_) == pytest.approx(0.18, abs=0.03)
    device.resize(slice_, 1)
    time.sleep(0.2)
    assert device.leave(call) == pytest.approx(0.12, abs=0.03)
    assert device.leave(slice_) == pytest.approx(0.28, abs=0.04)


def test_whoever_comes_and_goes_no_more_is_charged_than_went_by():
    device, charged = DeviceTime(), []
    began = time.monotonic()

    def use(seed):
        dice = random.Random(seed)
        for _ in range(50):
            share = device.enter(dice.randint(1, 20))
            time.sleep(dice.random() * 0.005)
            device.resize(share, dice.randint(1, 20))
            time.sleep(dice.random() * 0.005)
            charged.append(device.leave(share))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < sum(charged) <= time.monotonic() - began + 1e-6 and min(charged) >= 0


def test_a_slice_beside_a_call_is_charged_for_its_lines():
    leases = Leases()
    with leases.hold(SimpleNamespace(lease_token=1)) as lease:
        leases.note_lines(lease, 4)
        call = leases.device_time.enter()
        time.sleep(0.25)
        assert leases.device_time.leave(call) == pytest.approx(0.05, abs=0.02)
        leases.note_lines(lease, 0)  # it still holds the device while it records
        assert leases.device_seconds(lease) == pytest.approx(0.2, abs=0.03)
        time.sleep(0.1)
    assert lease.device_seconds == pytest.approx(0.3, abs=0.05)
