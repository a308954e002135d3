import logging
import multiprocessing
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from conftest import IRREGULAR

from colintern.core.errors import UserError
from colintern.encoding import tensor_cache as module
from colintern.encoding.tensor_cache import TensorCache
from colintern.storage.lock import hold_lock, try_lock

pytestmark = pytest.mark.integration
MB = 10**6


def tensor(seed: int, size: int = 1000) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shards(top: Path) -> list[Path]:
    return sorted(top.glob("*/*.safetensors"))


def filled(top: Path, name: str, keys: range, limit: int = MB) -> TensorCache:
    cache = TensorCache(top, name, limit)
    for key in keys:
        cache.put(f"k{key}", tensor(key))
    cache.flush()
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_back_to_the_bit_in_another_process_too(tmp_path, dtype):
    value = tensor(1).to(dtype).view(10, 100)
    first = TensorCache(tmp_path, "a", MB)
    first.put("k", value)
    assert torch.equal(first.get("k"), value), "before it is on disk"
    first.flush()
    for cache in (first, TensorCache(tmp_path, "a", MB)):
        assert "k" in cache and cache.get("k").dtype == dtype and torch.equal(cache.get("k"), value)
    assert TensorCache(tmp_path, "b", MB).get("k") is None, "another name, another cache"


def test_others_may_read_a_shard_as_far_as_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        filled(tmp_path, "a", range(3))
    finally:
        os.umask(before)
    [shard] = shards(tmp_path)
    assert shard.stat().st_mode & 0o777 == 0o640


def test_shards_are_written_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 8000)
    cache = filled(tmp_path, "a", range(5))
    assert [shard.name.split("-")[1] for shard in shards(tmp_path)] == ["2", "2", "1"]
    assert not cache.pending


def test_the_limit_evicts_what_was_used_longest_ago_and_never_what_is_in_use(tmp_path):
    old, older = filled(tmp_path, "old", range(10)), filled(tmp_path, "older", range(10))
    for age, cache in ((1000, old), (2000, older)):
        [shard] = cache.folder.iterdir()
        os.utime(shard, (1e9 - age, 1e9 - age))
    size = shards(tmp_path)[0].stat().st_size
    cache = TensorCache(tmp_path, "new", int(2.5 * size))
    cache.pending = {f"k{key}": tensor(key) for key in range(10)}
    cache.flush()
    assert [shard.parent.name for shard in shards(tmp_path)] == ["new", "old"]
    cache.pending = {f"k{key}": tensor(key) for key in range(10, 40)}
    cache.flush()
    assert cache.is_full and "k0" in cache and "k39" not in cache
    assert TensorCache(tmp_path, "new", MB).get("k0") is not None


def test_nothing_is_evicted_where_that_would_not_make_room(tmp_path, caplog):
    filled(tmp_path, "old", range(10))
    cache = TensorCache(tmp_path, "new", 60_000)
    cache.pending = {f"k{key}": tensor(key) for key in range(30)}
    cache.flush()
    assert cache.is_full and "do not fit" in caplog.text
    assert TensorCache(tmp_path, "old", MB).get("k9") is not None


def test_shards_of_its_own_name_are_evicted_too_unless_they_are_kept(tmp_path):
    filled(tmp_path, "a", range(10))
    cache = TensorCache(tmp_path, "a", 60_000)
    cache.pending = {f"k{key}": tensor(key) for key in range(10, 20)}
    cache.flush()
    assert "k0" not in cache and cache.get("k19") is not None and not cache.is_full
    cache = TensorCache(tmp_path, "a", 60_000)
    cache.pin(["k10"])
    cache.pending = {f"k{key}": tensor(key) for key in range(10)}
    cache.flush()
    assert cache.is_full and TensorCache(tmp_path, "a", MB).get("k19") is not None


def test_a_healthy_shard_outlives_a_process_that_may_open_no_more_files(tmp_path, caplog):
    filled(tmp_path, "a", range(3))
    cache = TensorCache(tmp_path, "a", MB)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert cache.get("k1") is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "cannot be read" in caplog.text
    assert TensorCache(tmp_path, "a", MB).get("k1") is not None


def test_a_cache_can_be_sent_to_another_process(tmp_path):
    cache = filled(tmp_path, "a", range(3))
    assert cache.get("k1") is not None
    assert torch.equal(pickle.loads(pickle.dumps(cache)).get("k1"), tensor(1))


def test_reading_a_shard_makes_it_the_last_used(tmp_path):
    filled(tmp_path, "a", range(3))
    [shard] = shards(tmp_path)
    os.utime(shard, (1e9, 1e9))
    TensorCache(tmp_path, "a", MB).get("k1")
    assert shard.stat().st_mtime > 1.5e9


def test_a_limit_of_zero_keeps_nothing(tmp_path):
    cache = filled(tmp_path, "a", range(3), limit=0)
    assert cache.is_full and cache.get("k0") is None and not shards(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "checksums", "type", "empty"])
def test_a_damaged_shard_is_dropped_with_a_word_and_filled_again(tmp_path, caplog, damage):
    filled(tmp_path, "a", range(3))
    [shard] = shards(tmp_path)
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-500] ^= 1
    elif damage == "header":
        data[3] ^= 0xFF
    elif damage == "checksums":
        data = data.replace(b'"k2":"', b'"kx":"', 1)
    elif damage == "type":
        data = data.replace(b'"F32"', b'"I32"')
    shard.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))])
    with caplog.at_level(logging.WARNING):
        cache = TensorCache(tmp_path, "a", MB)
        # safetensors keeps k2's bytes at the end of the file
        assert cache.get("k2") is None
    assert "computed again" in caplog.text and not shard.exists()
    cache.put("k2", tensor(2))
    cache.flush()
    assert torch.equal(TensorCache(tmp_path, "a", MB).get("k2"), tensor(2))


def test_a_shard_that_is_no_regular_file_is_never_opened_and_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path, "a", range(3))
    for number, make in enumerate(IRREGULAR.values()):
        make(Path("a", f"odd{number}.safetensors"))
    Path("a", "odd.partial").mkdir()
    cache = filled(tmp_path, "a", range(3, 6))
    cache.put("k6", tensor(6))
    cache.flush()
    assert all(torch.equal(cache.get(f"k{key}"), tensor(key)) for key in range(7)) and not cache.is_full
    for number, kind in enumerate(IRREGULAR):
        assert (
            caplog.text.count(f"odd{number}.safetensors: cannot be read, its tensors are computed again: it is {kind}")
            == 1
        )
    [shard, *_] = (path for path in shards(tmp_path) if path.is_file() and "odd" not in path.name)
    late = TensorCache(tmp_path, "a", MB)
    shard.unlink()
    os.mkfifo(shard)
    assert [late.get(f"k{key}") is None for key in range(7)].count(True) >= 1, "nor one that was found regular"


@pytest.mark.parametrize("kind", [kind for kind in IRREGULAR if kind != "a dangling link"])
def test_a_lock_that_is_no_regular_file_is_refused_by_name(tmp_path, kind):
    IRREGULAR[kind](tmp_path / "write.lock")
    for lock in (hold_lock(tmp_path / "write.lock"), try_lock(tmp_path / "write")):
        with pytest.raises((UserError, OSError), match=f"{kind}, not a regular file|symbolic links") as refused, lock:
            pass
        assert str(tmp_path / "write.lock") in str(refused.value)


def test_deleting_the_folder_under_a_reader_costs_no_more_than_the_tensors(tmp_path):
    cache, late = filled(tmp_path, "a", range(3)), TensorCache(tmp_path, "a", MB)
    assert cache.get("k1") is not None
    for shard in shards(tmp_path):
        shard.unlink()
    assert torch.equal(cache.get("k1"), tensor(1)), "its shard is mapped"
    assert late.get("k1") is None
    late.put("k1", tensor(1))
    late.flush()
    assert torch.equal(late.get("k1"), tensor(1))


def test_a_full_disk_stops_the_cache_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with caplog.at_level(logging.WARNING):
        cache = filled(tmp_path, "a", range(3))
    assert cache.is_full and "No space left" in caplog.text
    assert not list(cache.folder.iterdir())


def test_what_a_killed_writer_left_is_cleaned_up(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.partial").write_bytes(b"half")
    filled(tmp_path, "a", range(1))
    assert [p.suffix for p in (tmp_path / "a").iterdir()] == [".safetensors"]


def write(top: str, start: int) -> None:
    module.SHARD_BYTES = 8000
    filled(Path(top), "a", range(start, start + 40), limit=100 * MB)


def test_processes_that_write_at_once_lose_nothing_and_double_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(str(tmp_path), start)) for start in (0, 20, 0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = TensorCache(tmp_path, "a", MB)
    assert all(torch.equal(cache.get(f"k{key}"), tensor(key)) for key in range(60))
    assert sum(int(shard.name.split("-")[1]) for shard in shards(tmp_path)) == 60
