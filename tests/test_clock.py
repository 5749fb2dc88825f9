"""The clock of a prune, on a processor and on a GPU that does what it is told to do later."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from ssgr.stages.clock import Clock


class Gpu:
    """Work that is queued at once and done when the test says so; `waits` counts how often somebody waited for it."""

    def __init__(self) -> None:
        self.queued, self.now, self.waits = 0.0, 0.0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.at = gpu.queued

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.waits, gpu.now = gpu.waits + 1, max(gpu.now, self.at)

            def elapsed_time(self, later: Any) -> float:
                assert later.query(), "torch raises where an event is not over"
                return float(later.at - self.at) * 1000

        self.Event = Event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", made.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


def test_a_part_is_counted_once_on_a_processor() -> None:
    clock = Clock(torch.device("cpu"))
    clock.begin({"forward": 10.0})
    with clock.timed("forward"):
        time.sleep(0.05)
        with clock.timed("statistics"):
            time.sleep(0.1)
    time.sleep(0.1)  # of nothing that is counted
    with pytest.raises(KeyError), clock.timed("solve"):
        raise KeyError
    found = clock.seconds()
    assert 10.05 <= found["forward"] < 10.1 and found["statistics"] >= 0.1 and found["solve"] < 0.05


def test_a_gpu_is_asked_and_not_waited_for(gpu: Gpu) -> None:
    clock = Clock(torch.device("cuda"))
    with clock.timed("forward"):
        gpu.queued += 2
        with clock.timed("statistics"):
            gpu.queued += 3
        gpu.queued += 4
    gpu.queued += 50  # of nothing that is counted
    assert clock.seconds() == {}
    gpu.now = 5
    assert clock.seconds() == {"forward": 2.0, "statistics": 3.0}
    gpu.now = 9
    assert clock.seconds() == {"forward": 6.0, "statistics": 3.0} and gpu.waits == 0
    with clock.timed("solve"):
        gpu.queued += 1
    assert clock.seconds(whole=True) == {"forward": 6.0, "statistics": 3.0, "solve": 1.0} and gpu.waits == 1


def test_a_gpu_that_keeps_up_leaves_few_events(gpu: Gpu) -> None:
    clock = Clock(torch.device("cuda"))
    for _ in range(5000):
        with clock.timed("forward"):
            gpu.queued += 1
        gpu.now = gpu.queued
        assert len(clock._unread) < 300
    assert clock.seconds()["forward"] == 5000 and gpu.waits == 0
