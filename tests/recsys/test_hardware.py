"""What the system tells of caches and memory."""

import torch

from recsys.hardware import available_bytes, cache_bytes


def test_caches_are_read_without_that_of_instructions(tmp_path):
    for index, (level, kind, size) in enumerate(
        (("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "32768K"))
    ):
        directory = tmp_path / f"index{index}"
        directory.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (directory / name).write_text(f"{text}\n")
    assert cache_bytes(tmp_path) == {"L1": 32 << 10, "L3": 32 << 20}


def test_a_system_that_tells_nothing_has_no_caches(tmp_path):
    assert cache_bytes(tmp_path) == {}


def test_there_is_memory():
    assert 1 << 20 < available_bytes(torch.device("cpu")) < 1 << 50
