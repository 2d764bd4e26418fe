"""From patterns to files: braces, odd names, the path under the root, what may be shown of a URL; and which errors are worth another attempt."""

import errno
import threading
import time

import aiohttp
import fsspec
import pytest
import yarl
from multidict import CIMultiDict, CIMultiDictProxy

from protoclip_scale.data.sources.filesystems import join, shown, shown_pattern, without_query
from protoclip_scale.data.sources.listing import expand_braces, in_threads, list_places
from protoclip_scale.data.sources.retry import Cancelled, may_pass, retry, retry_after, status_of, text_of
from protoclip_scale.errors import UserError


def once(action, doing, place):
    return action()


def names(patterns, root, suffixes=(".parquet",)) -> list[str]:
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return [place.relative for place in list_places(patterns, str(root), suffixes, once)]


def test_braces_are_written_out():
    assert expand_braces("a-{0008..0011}.tar") == ["a-0008.tar", "a-0009.tar", "a-0010.tar", "a-0011.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand_braces("{ab}/*.parquet") == ["{ab}/*.parquet"]
    with pytest.raises(UserError, match="backwards"):
        expand_braces("{5..3}")


def test_names_with_pattern_characters_are_files_first(tmp_path):
    for name in ("a[1].parquet", "b{0..1}.parquet", "b0.parquet", "what?.parquet", "{x}.parquet"):
        (tmp_path / name).write_bytes(b"data")
    for name in ("a[1].parquet", "b{0..1}.parquet", "what?.parquet"):
        assert names(name, tmp_path) == [name]
    (tmp_path / "b{0..1}.parquet").unlink()
    (tmp_path / "b1.parquet").write_bytes(b"data")
    assert names("b{0..1}.parquet", tmp_path) == ["b0.parquet", "b1.parquet"]
    odd = tmp_path / "root [1] *"
    odd.mkdir()
    (odd / "z.parquet").write_bytes(b"data")
    assert names("*.parquet", odd) == ["z.parquet"]


def test_each_file_stands_once_in_the_order_of_paths_under_the_root(tmp_path):
    for name in ("b/2.parquet", "a/1.parquet", "b/notes.txt", "b/deep/3.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"data")
    assert names(("b", "a/*.parquet", str(tmp_path / "b" / "2.parquet"), f"file://{tmp_path}/b/*.parquet"), tmp_path) == ["a/1.parquet", "b/2.parquet"]
    assert names("**/*.parquet", tmp_path) == ["a/1.parquet", "b/2.parquet", "b/deep/3.parquet"]
    assert names("*", tmp_path, ()) == ["a", "b"]  # places that are folders
    assert names(str(tmp_path / "a" / "1.parquet"), tmp_path / "elsewhere") == [str(tmp_path / "a" / "1.parquet")]


def test_a_link_has_the_size_and_time_of_what_it_leads_to(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "file")
    (before,) = list_places(("*.parquet",), str(tmp_path), (".parquet",), once)
    time.sleep(0.01)
    (tmp_path / "file").write_bytes(b"54321")
    (after,) = list_places(("*.parquet",), str(tmp_path), (".parquet",), once)
    assert before.size == after.size == 5 and before.stamp != after.stamp


def test_places_in_memory_have_paths_under_the_root_and_no_stamp():
    fsspec.filesystem("memory").pipe({"/listing/x/b.parquet": b"1", "/listing/x/a.parquet": b"22", "/listing/y.txt": b""})
    for pattern in ("x", "x/*.parquet", "x/{a,b}.parquet"):
        places = list_places((pattern,), "memory://listing", (".parquet",), once)
        assert [(place.relative, place.size, place.stamp) for place in places] == [("x/a.parquet", 2, ""), ("x/b.parquet", 1, "")]


def test_neither_signatures_nor_passwords_are_shown():
    assert shown("https://me:secret@host/a.parquet?signature=secret") == "https://host/a.parquet"
    assert shown("s3://bucket/a?b.parquet") == "s3://bucket/a?b.parquet"
    assert without_query("https://host/download?id=3") == "https://host/download?id=3"  # the only name it has
    assert shown_pattern("a.parquet?signature=secret", "https://host") == "a.parquet"
    assert shown_pattern("what?.parquet", "/data") == "what?.parquet"
    assert join("s3://bucket/set", ".") == "s3://bucket/set" and join("https://host/", "a/b") == "https://host/a/b"


def answer(status: int, **headers: str) -> aiohttp.ClientResponseError:
    request = aiohttp.RequestInfo(yarl.URL("https://host/a.parquet"), "GET", CIMultiDictProxy(CIMultiDict()))
    return aiohttp.ClientResponseError(request, (), status=status, message="an answer", headers=headers)


def not_found_because(cause: Exception) -> FileNotFoundError:
    """What fsspec's HTTP filesystem says whenever it could not ask."""
    error = FileNotFoundError("https://host/a.parquet")
    error.__cause__ = cause
    return error


def test_which_errors_may_pass():
    remote = {
        True: (answer(503), answer(429), answer(408), aiohttp.ServerDisconnectedError(), TimeoutError(), not_found_because(answer(503)), not_found_because(aiohttp.ClientPayloadError("half")), OSError("5 of 8 bytes came")),
        False: (answer(403), answer(404), answer(401), not_found_because(answer(404)), FileNotFoundError("gone"), PermissionError("no"), type("NoCredentialsError", (Exception,), {})()),
    }
    for passes, errors in remote.items():
        for error in errors:
            assert may_pass(error, remote=True) is passes, error
    assert may_pass(OSError(errno.EIO, "disk"), remote=False)
    assert not any(may_pass(error, remote=False) for error in (FileNotFoundError(errno.ENOENT, "x"), OSError("corrupt"), ValueError("x")))


def test_status_wait_and_words_of_an_error():
    busy = not_found_because(answer(503, **{"Retry-After": "7"}))
    assert (status_of(busy), retry_after(busy), retry_after(answer(503)), status_of(TimeoutError())) == (503, 7.0, 0.0, None)
    assert "503" in text_of(busy) and text_of(TimeoutError()) == "TimeoutError:"


def test_retry_waits_longer_each_time_and_ends_on_time(monkeypatch):
    clock, waits = [0.0], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("protoclip_scale.data.sources.retry.time.sleep", sleep)
    monkeypatch.setattr("protoclip_scale.data.sources.retry.time.monotonic", lambda: clock[0])

    def fail():
        raise answer(502)

    with pytest.raises(UserError, match=r"^s3://b/a: reading failed for 100 s \(data.retry_seconds 100\); the last error was .*502") as caught:
        retry(fail, 100.0, "reading", "s3://b/a", remote=True)
    assert sum(waits) == pytest.approx(100.0) and all(0.5 <= wait / 0.5 / 2**number <= 1.5 for number, wait in enumerate(waits[:5]))
    assert isinstance(caught.value.__cause__, aiohttp.ClientResponseError)
    failures = iter([answer(502, **{"Retry-After": "20"}), ConnectionResetError()])

    def recover():
        for error in failures:
            raise error
        return "here"

    waits.clear()
    assert retry(recover, 100.0, "reading", "s3://b/a", remote=True) == "here" and waits[0] == 20.0


def test_a_cancelled_retry_ends_without_waiting():
    cancelled, attempts = threading.Event(), []

    def fail():
        attempts.append(None)
        cancelled.set()  # while the attempt is under way
        raise answer(502, **{"Retry-After": "3000"})

    for _ in range(2):
        with pytest.raises(Cancelled, match="s3://b/a: reading was cancelled"):
            retry(fail, 3600.0, "reading", "s3://b/a", True, cancelled)
    assert len(attempts) == 1


def test_after_an_error_no_further_item_is_begun():
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise OSError("down")
        time.sleep(0.01)

    with pytest.raises(OSError, match="down"):
        in_threads(work, range(2000))
    assert len(begun) < 200
    assert in_threads(lambda number: number * number, range(50)) == [number * number for number in range(50)]
