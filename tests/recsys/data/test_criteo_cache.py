"""The Criteo cache: used when it fits, rebuilt when it does not, whole or absent whatever happens meanwhile."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import recsys.data.criteo
from recsys.data.criteo import Criteo, Options
from recsys.data.criteo_cache import hash_content, publish_once, write_ids, write_rows
from tests.recsys.data import criteo_rows

REPOSITORY = Path(__file__).parents[3]


class Counting:
    """Calls through, and counts."""

    def __init__(self, call) -> None:
        self.call, self.calls = call, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.call(*args, **kwargs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return criteo_rows.write_rows(tmp_path / "day.tsv", criteo_rows.draw_rows(200))


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """How often the text was read."""
    counting = Counting(write_rows)
    monkeypatch.setattr("recsys.data.criteo.write_rows", counting)
    return counting


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if files had been written long ago."""
    monkeypatch.setattr("recsys.data.criteo_cache.SETTLED_S", -3600.0)


def built(cache_dir: Path) -> list[Path]:
    return sorted(file.parent for file in cache_dir.glob("*/metadata.json"))


def leftovers(cache_dir: Path) -> list[Path]:
    return list(cache_dir.glob("*partial*"))


@pytest.mark.usefixtures("settled")
def test_the_second_build_reads_nothing_again(
    path: Path, cache_dir: Path, builds: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Criteo.build(Options(path=str(path)), cache_dir)
    monkeypatch.setattr("recsys.data.criteo_cache._hash_file", lambda file: pytest.fail(f"{file} was read again"))
    second = Criteo.build(Options(path=str(path)), cache_dir)
    assert builds.calls == 1
    assert second.metadata == first.metadata
    assert [file.name for file in built(cache_dir)[0].iterdir() if file.name not in criteo_rows.CACHE_ARRAYS] == [
        "metadata.json"
    ]


def test_a_copy_elsewhere_is_the_same_content(path: Path, cache_dir: Path, builds: Counting) -> None:
    first = Criteo.build(Options(path=str(path)), cache_dir)
    copy = path.with_name("copy.tsv")
    copy.write_bytes(path.read_bytes())
    assert Criteo.build(Options(path=str(copy)), cache_dir).fingerprint() == first.fingerprint()
    assert builds.calls == 1


@pytest.mark.parametrize(
    "change",
    [
        {"test_fraction": 0.25},
        {"validation_fraction": 0.15},
        {"ids": "modulo"},
        {"min_count": 2},
        {"max_num_embeddings": 9},
    ],
)
def test_other_settings_make_another_cache(path: Path, cache_dir: Path, builds: Counting, change: dict) -> None:
    first = Criteo.build(Options(path=str(path)), cache_dir)
    second = Criteo.build(Options(path=str(path), **change), cache_dir)
    assert builds.calls == 2
    assert first.fingerprint() != second.fingerprint()
    assert len(built(cache_dir)) == 2


def test_settings_without_effect_share_a_cache(path: Path, cache_dir: Path, builds: Counting) -> None:
    Criteo.build(Options(path=str(path)), cache_dir)
    Criteo.build(Options(path=str(path), cardinalities="criteo_tb", max_malformed_fraction=0.5), cache_dir)
    assert builds.calls == 1


@pytest.mark.usefixtures("settled")
def test_content_of_the_same_size_and_time_is_noticed(path: Path, cache_dir: Path, builds: Counting) -> None:
    first = Criteo.build(Options(path=str(path)), cache_dir)
    stat, text = path.stat(), path.read_text()
    time.sleep(0.02)  # time stamps have a resolution of milliseconds
    path.write_text(text[:1].translate(str.maketrans("01", "10")) + text[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    second = Criteo.build(Options(path=str(path)), cache_dir)
    assert builds.calls == 2
    assert second.fingerprint() != first.fingerprint()
    assert second.read("train", np.array([0])).labels != first.read("train", np.array([0])).labels


def test_a_file_just_written_is_hashed_again(path: Path, tmp_path: Path) -> None:
    """Within the resolution of time stamps a second change would look like none."""
    hash_content([path], tmp_path)
    assert not list(tmp_path.glob("criteo-content-*"))


def test_a_file_that_grows_while_it_is_read_is_refused(
    path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(directory: Path, files, malformed) -> int:
        rows = write_rows(directory, files, malformed)
        with path.open("a") as file:
            file.write(f"{criteo_rows.draw_rows(1)[0]}\n")
        return rows

    monkeypatch.setattr("recsys.data.criteo.write_rows", grow)
    with pytest.raises(ValueError, match=r"day.tsv changed while it was read"):
        Criteo.build(Options(path=str(path)), cache_dir)
    assert not built(cache_dir)


@pytest.mark.parametrize("step", ["write_rows", "write_ids"])
def test_a_failed_build_leaves_nothing(path: Path, cache_dir: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"write_rows": write_rows, "write_ids": write_ids}[step]

    def fail(*args):
        done(*args)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recsys.data.criteo, step, fail)
        with pytest.raises(OSError, match="No space left"):
            Criteo.build(Options(path=str(path)), cache_dir)
    assert not built(cache_dir)
    assert not leftovers(cache_dir)
    assert Criteo.build(Options(path=str(path)), cache_dir).metadata["rows"] == 200


def test_the_name_is_given_to_a_finished_directory(tmp_path: Path) -> None:
    """In one step: what bears the name is the very directory that was written, not a copy still growing."""
    written = []

    def write(directory: Path) -> None:
        assert not (tmp_path / "criteo-1").exists()
        written.append(directory.stat().st_ino)

    publish_once(tmp_path / "criteo-1", write)
    assert written == [(tmp_path / "criteo-1").stat().st_ino]


def test_a_killed_build_is_swept_away(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from recsys.data.criteo_cache import publish_once\n"
        "def write(directory):\n"
        "    (directory / 'metadata.json').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "publish_once(pathlib.Path(sys.argv[1]), write)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "criteo-1")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert len(leftovers(tmp_path)) == 1
    assert not (tmp_path / "criteo-1").exists()
    publish_once(tmp_path / "criteo-1", lambda directory: None)
    assert list((tmp_path / "criteo-1").iterdir()) == []
    assert not leftovers(tmp_path)


def test_a_machine_without_our_lock_may_be_first(tmp_path: Path) -> None:
    def lose_the_race(directory: Path) -> None:
        (tmp_path / "criteo-1").mkdir()
        (tmp_path / "criteo-1" / "theirs").touch()

    publish_once(tmp_path / "criteo-1", lose_the_race)
    assert (tmp_path / "criteo-1" / "theirs").exists()
    assert not leftovers(tmp_path)


def test_two_processes_build_once(path: Path, cache_dir: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from recsys.data.criteo_cache import hash_content, publish_once, write_rows\n"
        "from recsys.data.criteo_tsv import Malformed\n"
        "path, cache_dir = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
        "def write(directory):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    write_rows(directory, [path], Malformed(str(path), 0.0))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "publish_once(cache_dir / hash_content([path], cache_dir), write)\n"
        "print((cache_dir / hash_content([path], cache_dir) / 'labels.npy').stat().st_size)"
    )
    cache_dir.mkdir()
    command = [sys.executable, "-c", code, str(path), str(cache_dir)]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert said == ["328\n", "writing\n328\n"]
    assert not leftovers(cache_dir)


def test_builds_at_the_same_time_agree(path: Path, cache_dir: Path, builds: Counting) -> None:
    """Threads stand for ranks: the lock belongs to an open file, not to a process."""
    build_one = partial(Criteo.build, Options(path=str(path)), cache_dir)
    with ThreadPoolExecutor(4) as pool:
        datasets = [future.result() for future in [pool.submit(build_one) for _ in range(4)]]
    assert builds.calls == 1
    assert len({dataset.fingerprint() for dataset in datasets}) == 1
    assert len(built(cache_dir)) == 1


def test_a_cache_cut_off_later_is_not_read(path: Path, cache_dir: Path) -> None:
    Criteo.build(Options(path=str(path)), cache_dir)
    ids = built(cache_dir)[0] / "ids.npy"
    np.save(ids, np.load(ids)[:-1])
    with pytest.raises(ValueError, match=r"ids.npy has shape \(199, 26\), its metadata says \(200, 26\): delete"):
        Criteo.build(Options(path=str(path)), cache_dir)
