"""What the system tells of caches and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recsys.runs.environment import available_bytes, cache_bytes, huge_page_share

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def test_share_of_huge_pages(tmp_path):
    rollup = tmp_path / "smaps_rollup"
    assert huge_page_share(rollup) is None
    rollup.write_text("1-2 ---p 00000000 00:00 0   [rollup]\nAnonymous:   4000 kB\nAnonHugePages:   3000 kB\n")
    assert huge_page_share(rollup) == 0.75
    rollup.write_text("Rss:   4000 kB\n")
    assert huge_page_share(rollup) is None


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system gives no huge pages")
def test_programs_have_their_tensors_in_huge_pages():
    code = """
import launch, torch
from recsys.runs.environment import huge_page_share
from recsys.train.heap import keep_freed_memory
keep_freed_memory()
kept = torch.ones(64 << 20)
print(huge_page_share())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(told) > 0.5
