from __future__ import annotations

from runner.batch.memory_sampler import MemorySampler, ProcessMemory


def test_a_window_sees_the_peak_while_it_is_open():
    readings = iter([(10, None), (10, None), (30, 5), (20, 9), *[(15, 1)] * 1000])
    sampler = MemorySampler(0.001, lambda: next(readings))
    window = sampler.window()
    with sampler:
        while window.gpu_peak != 9:
            pass
        late = sampler.window()
    assert (window.rss_peak, window.gpu_peak) == (30, 9)
    assert late.rss_peak is not None
    assert late.rss_peak <= 20


def test_this_process_has_memory_and_says_none_without_a_gpu():
    rss, gpu = ProcessMemory()()
    assert rss is not None
    assert rss > 10 * 2**20
    assert gpu is None or gpu >= 0
