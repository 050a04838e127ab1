"""Which devices a host's workers are started on, by what its nvidia-smi says."""

import os
import subprocess
import threading
import time

import pytest

from services.worker import device as device_module
from services.worker.device import GpuMeter, GpuReading, enumerate_devices
from shared.settings import Settings
from tests.support.servers import wait_until


@pytest.fixture
def four_gpus(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "$i, GPU-aaaa-$i, 81559"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def settings(**more):
    nowhere = {"database_url": "postgresql://x@y/z", "redis_url": "redis://x", "store_url": "/nonexistent"}
    return Settings(**nowhere, **more)


def names(**more):
    return [device.name for device in enumerate_devices(settings(**more))]


def test_all_gpus_or_the_chosen_ones_or_so_many(four_gpus, monkeypatch):
    assert names() == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert names(workers="2") == ["cuda:0", "cuda:1"]
    assert names(gpus="3,1,3") == ["cuda:3", "cuda:1"]
    assert names(gpus="GPU-aaaa-2,0,2") == ["cuda:2", "cuda:0"]
    monkeypatch.setenv("LAMPLIGHTER_GPUS", "0, 2")  # as Compose gives it
    assert names() == ["cuda:0", "cuda:2"]
    monkeypatch.setenv("LAMPLIGHTER_GPUS", "")
    assert len(names()) == 4
    assert names(device="cpu", workers="2") == ["cpu:0", "cpu:1"]


def test_a_gpu_that_is_not_there_is_told_of_and_keeps_no_other_idle(four_gpus, caplog):
    assert names(gpus="0,7,GPU-bbbb") == ["cuda:0"]
    assert caplog.records[-1].missing == ["7", "GPU-bbbb"]
    with pytest.raises(RuntimeError, match=r"names 7; nvidia-smi lists 0 \(GPU-aaaa-0\), 1 "):
        names(gpus="7")
    with pytest.raises(ValueError, match="gpus"):
        names(gpus="first")


def test_a_device_pins_its_process(four_gpus):
    device = enumerate_devices(settings(gpus="2"))[0]
    assert device.environment(1, None) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2"}
    assert device.memory_bytes == int(81559 * 2**20 * 0.8)


@pytest.fixture
def troubled(tmp_path, monkeypatch):
    """Of three GPUs the second one fell off its bus: asked for all, nvidia-smi fails. The third has lost its memory."""
    program = tmp_path / "nvidia-smi"
    program.write_text("""#!/bin/sh
case "$*" in
  *utilization*"-i 0") echo "37, 1024, 81559" ;;
  *utilization*) echo "[N/A], [N/A], [N/A]" ;;
  *"-i 0") echo "0, GPU-aa00, 81559" ;;
  *"-i 2") echo "2, GPU-aa02, [Unknown Error]" ;;
  *) echo "Unable to determine the device handle for GPU1: 0000:41:00.0: Unknown Error"; exit 15 ;;
esac
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_gpus_in_trouble_are_told_of_and_keep_no_other_idle(troubled, caplog):
    assert names() == names(gpus="0,1") == ["cuda:0"]
    told = {record.message for record in caplog.records}
    assert {"nvidia-smi fails for some GPU, or for all", "a GPU is in trouble", "chosen GPUs are not there"} == told


def test_a_meter_reads_its_gpu_and_says_nothing_of_one_that_says_nothing(troubled):
    def read(device):
        meter, stop = GpuMeter(device), threading.Event()
        thread = threading.Thread(target=meter.run, args=(stop, 0.01))
        thread.start()
        time.sleep(0.5)
        stop.set()
        thread.join()
        return meter.reading

    assert read("cuda:0") == GpuReading(0.37, 1024 * 2**20, 81559 * 2**20)
    assert read("cuda:2") is None and read("cpu:0") is None


def test_a_gpu_that_answers_no_more_is_not_shown_as_it_was(four_gpus, tmp_path, monkeypatch, caplog):
    """Its nvidia-smi hangs: the last reading is not the truth for ever, and nobody takes the host for one of CPUs."""
    monkeypatch.setattr(device_module, "SMI_SECONDS", 0.3)
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "5, 6, 7"\n')
    meter, stop = GpuMeter("cuda:0"), threading.Event()
    thread = threading.Thread(target=meter.run, args=(stop, 0.05))
    thread.start()
    wait_until(lambda: meter.reading is not None, 5)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    wait_until(lambda: meter.reading is None, 5)
    assert thread.is_alive() and "a GPU cannot be read" in caplog.messages
    stop.set()
    thread.join()
    with pytest.raises(subprocess.TimeoutExpired):
        names()
