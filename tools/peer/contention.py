"""How much of the machine other processes took while something was being timed.

A shared machine makes every number suspect; this says by how much. Linux only: reads /proc/stat,
whose clock ticks at 10 ms, so a share over less than about 100 ms means little.
"""

import os
import time


def _busy_seconds():
    """CPU seconds all processors have spent on anything but idling, since boot."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Contention:
    """Context manager: `seconds` elapsed, and `others`, the share of all processors (0 to 1) that others used.

    `own_cpu` returns the CPU seconds used so far by whatever is being measured.
    """

    def __init__(self, own_cpu=time.process_time):
        self._own_cpu = own_cpu

    def __enter__(self):
        self._busy, self._own = _busy_seconds(), self._own_cpu()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._began
        busy, own = _busy_seconds() - self._busy, self._own_cpu() - self._own
        self.others = max(0.0, (busy - own) / (self.seconds * os.cpu_count()))


def wait_until_quiet(limit, patience):
    """Sleep until others use at most `limit` of the machine; give up after `patience` seconds. Return success."""
    deadline = time.monotonic() + patience
    while True:
        with Contention() as clock:
            time.sleep(0.25)
        if clock.others <= limit:
            return True
        if time.monotonic() >= deadline:
            return False
