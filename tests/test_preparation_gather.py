"""Gathering: lists of every layout, balancing, and downloads from a real server that misbehaves, killed and gone on with."""

import asyncio
import bz2
import csv
import fcntl
import gzip
import json
import lzma
import multiprocessing.forkserver
import os
import random
import socket
import urllib.request
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from protoclip_scale.data.decode import Limits
from protoclip_scale.data.sources.reader import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.preparation import addresses, download, encode_pool
from protoclip_scale.preparation.download import Downloader, DownloadSettings, Failure
from protoclip_scale.preparation.encode_pool import EncodePool
from protoclip_scale.preparation.gather import GatherSettings, gather
from protoclip_scale.preparation.gather_report import write_report
from protoclip_scale.preparation.images import ImageSettings
from protoclip_scale.preparation.lists import TEXTS, ListOptions, Row, clean_web_text, read_rows
from protoclip_scale.preparation.pair_list import ListSettings, PairList, list_facts, prepare_list
from protoclip_scale.preparation.queries import QueryIndex, _key, balance, words
from protoclip_scale.recipe import schema
from tests.servers import Server
from tests.servers.picture_server import MOST
from tests.support import CORPUS, _run
from tools import gather_images

QUICK = DownloadSettings(connections=16, per_host=4, timeout=20, retries=12, backoff=0.01, allow_private=True, max_bytes=1_000_000)
NUM_PICTURES = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, tuple[bytes, list[str]]]:
    """Name -> picture and captions, from the demo corpus; every picture is a plain WebP that is kept byte for byte."""
    multiprocessing.forkserver.ensure_running()  # with tests.support's preloads, before an encode pool asks for its own
    rows = pq.read_table(CORPUS / "val-00000-of-00001.parquet").slice(0, NUM_PICTURES).to_pylist()
    return {f"{number:03d}.webp": (row["image"]["bytes"], row["caption"]) for number, row in enumerate(rows)}


@pytest.fixture(scope="module")
def server(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, (picture, _) in pictures.items():
        (root / name).write_bytes(picture)
    with Server("picture_server", "--root", root) as running:
        running.root = root
        yield running


def settings(path: Path, out: Path, rows_per_shard: int = 16, download: DownloadSettings = QUICK, **others) -> GatherSettings:
    image = ImageSettings(format="webp")
    others = {"workers": 0, "row_group_rows": 5} | others
    return GatherSettings(out, ListSettings(path, "conceptual_captions", rows_per_shard=rows_per_shard), download, image, **others)


def conceptual_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{caption}\t{url}\n" for caption, url in rows), encoding="utf-8")
    return path


def picture_list(path: Path, server: Server, pictures: dict, others: list[tuple[str, str]] = ()) -> Path:
    rows = [(captions[0], f"{server.url}/pictures/{name}") for name, (_, captions) in pictures.items()]
    return conceptual_list(path, rows + list(others))


def gathered_rows(out: Path) -> list[dict]:
    return [row for shard in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(shard).to_pylist()]


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*.parquet"))}


# Lists


def read(path: Path, layout: str, **options) -> tuple[list[Row], dict[str, int]]:
    dropped = Counter()
    rows = list(read_rows(path, layout, ListOptions(**options), dropped))
    return rows, {reason: number for reason, number in dropped.items() if number}


def test_conceptual_captions_list(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text(
        'a "quoted" dog \x07 runs\thttp://a.example/1.jpg\n\thttp://a.example/2.jpg\nno tab\ncafé\u2028bar\thttp://b.example/é.jpg\r\n'
    )
    rows, dropped = read(path, "conceptual_captions")
    assert rows == [Row("http://a.example/1.jpg", ('a "quoted" dog runs',)), Row("http://b.example/é.jpg", ("café bar",))]
    assert dropped == {"no text": 1, "line does not fit the layout": 1}
    with pytest.raises(UserError, match="--text has no effect with --list conceptual_captions"):
        read(path, "conceptual_captions", text="title")


def test_declip_list(tmp_path):
    path = tmp_path / "list.json"
    lines = [
        {"caption": "100% wool", "filename": "x/1.jpg", "url": "http://f.example/1.jpg"},
        {"caption": ["a", "b"], "url": "http://f.example/2.jpg"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"caption": "x"}\n[1]\nbroken\n')
    rows, dropped = read(path, "yfcc15m_declip")
    assert rows == [Row("http://f.example/1.jpg", ("100% wool",), ("x/1.jpg",)), Row("http://f.example/2.jpg", ("a", "b"), ("",))]
    assert dropped == {"line does not fit the layout": 3}


TITLE = "denise%27s+peanut+chicken"  # openai/CLIP issue 103
DESCRIPTION = (
    "recipe+here%3A+%3Ca+href%3D%22http%3A%2F%2Fx.example%2FDetail.aspx%22%3Ewww.x.example%3C%2Fa%3E%0Awith+salt+%26amp%3B+5+%3C+6"
)
CLEAN = ("denise's peanut chicken", "recipe here: www.x.example with salt & 5 < 6")


@pytest.mark.parametrize("columns", [25, 23])
def test_openai_list_is_joined_with_the_metadata_by_photo_id(tmp_path, columns):
    def metadata(number: int, photo: int, title: str, description: str, marker: str = "0") -> str:
        front = [str(number), str(photo), "hash"] if columns == 25 else [str(photo)]
        rest = ["user", "nick", "taken", "uploaded", "device", title, description, "tags", "", "1", "2", "16", f"http://p.example/{photo}"]
        return "\t".join([*front, *rest, f"http://f.example/{photo}.jpg", "by", "http://cc.example/by", "1", "2", "s", "so", "jpg", marker])

    lines = [
        metadata(0, 11, TITLE, DESCRIPTION),
        metadata(1, 12, "", ""),
        metadata(2, 13, "kept+out", ""),
        metadata(3, 14, "video", "", "1"),
    ]
    lines += [metadata(4, 15, "", "only+this"), metadata(5, 16, "+", "%20")]
    (tmp_path / "a.tsv").write_text("\n".join(lines[:3]) + "\n")
    (tmp_path / "b.tsv.bz2").write_bytes(bz2.compress("\n".join(lines[3:]).encode()))
    path = tmp_path / "list.tsv"
    path.write_text("".join(f"{number}\t{photo}\tx\n" for number, photo in enumerate([15, 11, 12, 14, 16, 99, 11])) + "broken\n")
    files = (str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv.bz2"))

    def captions(text: str, **options) -> list[tuple[str, ...]]:
        rows, dropped = read(path, "yfcc15m_openai", metadata=files, text=text, **options)
        assert (
            dropped["not a photo"]
            == dropped["photo is not in the metadata"]
            == dropped["photo stands twice in the list"]
            == dropped["line does not fit the layout"]
            == 1
        )
        assert dropped["no text"] == 5 - 1 - len(rows)
        assert all(
            row.url == f"http://f.example/{row.extra[0]}.jpg"
            and row.extra[1:] == (f"http://p.example/{row.extra[0]}", "http://cc.example/by")
            for row in rows
        )
        return [row.captions for row in rows]

    assert captions("both") == [CLEAN, ("only this",)]
    assert captions("title") == [CLEAN[:1]]
    assert captions("description") == [CLEAN[1:], ("only this",)]
    assert captions("description", remove_addresses=True) == [("recipe here: with salt & 5 < 6",), ("only this",)]
    chosen = captions("random")
    assert chosen == captions("random") and chosen[0] in (CLEAN[:1], CLEAN[1:]) and chosen[1] == ("only this",)
    with pytest.raises(UserError, match="--metadata"):
        read(path, "yfcc15m_openai")
    with pytest.raises(UserError, match="1 columns where the YFCC100M dataset has 25"):
        (tmp_path / "a.tsv").write_text("x\n")
        read(path, "yfcc15m_openai", metadata=files)


def test_what_is_no_utf8_costs_its_line_or_its_character(tmp_path):
    lines = ['{"caption": "a cat", "url": "http://x/\\ud83d"}', '{"caption": "b \\ud83d", "url": "http://x/1"}', "[" * 100_000]
    (tmp_path / "list.json").write_text("\n".join(lines) + "\n")
    listed = ListSettings(tmp_path / "list.json", "yfcc15m_declip")
    summary = prepare_list(listed, list_facts(listed), tmp_path / "pass-0.arrow")
    assert list(PairList(tmp_path / "pass-0.arrow").rows()) == [Row("http://x/1", ("b",), ("",))]
    assert summary["lines_left_out"] == {"line does not fit the layout": 2}
    (tmp_path / "list.csv").write_text("url,caption\nhttp://x/2,c\n", encoding="utf-8-sig")
    assert read(tmp_path / "list.csv", "csv") == ([Row("http://x/2", ("c",))], {})


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_list_that_is_cut_short_is_one_line(tmp_path, capsys, compress):
    path = tmp_path / f"list.tsv{ {gzip.compress: '.gz', bz2.compress: '.bz2', lzma.compress: '.xz'}[compress] }"
    path.write_bytes(compress(random.Random(0).randbytes(50_000).hex().encode())[:-20_000])
    assert gather_images.main(["--list", "conceptual_captions", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "may be cut short or damaged" in one_line(capsys)


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_random_text_takes_both_about_equally(tmp_path):
    titles = sum(TEXTS["random"]("title", "description", photo) == ("title",) for photo in range(1000))
    assert 430 < titles < 570


def test_tables_with_named_columns(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('id,link,short,long\n7,http://a.example/1,"one, two",more\n8,http://a.example/2,,\n9,http://a.example/3\n')
    options = {"url_column": "link", "caption_columns": ("long", "short"), "keep_columns": ("id",)}
    assert read(path, "csv", **options) == (
        [Row("http://a.example/1", ("more", "one, two"), ("7",))],
        {"no text": 1, "line does not fit the layout": 1},
    )
    (tmp_path / "list.tsv").write_text('http://a.example/1\t"a dog\nhttp://a.example/2\tb\n')
    rows, _ = read(tmp_path / "list.tsv", "tsv", header=("url", "caption"))
    assert [row.captions for row in rows] == [('"a dog',), ("b",)]
    with pytest.raises(UserError, match="no column url; it has id, link, short, long"):
        read(path, "csv")


def test_web_text_is_cleaned():
    assert clean_web_text("a+%3Cb%3Ebold%3C%2Fb%3E+1%2B1%3D2+%3C3+caf%C3%A9%0A%0Ax") == "a bold 1+1=2 <3 café x"
    assert clean_web_text("%3C!--+x+--%3Esee+http%3A%2F%2Fa.example%2Fb+now", remove_addresses=True) == "see now"


def test_rows_of_one_url_become_one_with_all_captions(tmp_path):
    path = conceptual_list(
        tmp_path / "list.tsv", [("one", "http://a/1"), ("two", "http://a/2"), ("three", "http://a/1"), ("one", "http://a/1")]
    )
    listed = ListSettings(path, "conceptual_captions", rows_per_shard=1)
    summary = prepare_list(listed, list_facts(listed), tmp_path / "pass-0.arrow")
    pairs = PairList(tmp_path / "pass-0.arrow")
    assert [pairs.shard(number) for number in range(pairs.num_shards)] == [
        [Row("http://a/1", ("one", "three"))],
        [Row("http://a/2", ("two",))],
    ]
    assert summary == {"rows": 4, "lines_left_out": {}, "repeated_urls": 2, "pairs": 2}


# Queries


def slow_balance(rows: list[Row], queries: list[str], maximum: int, keep_unmatched: bool) -> set[str]:
    """URLs that stay: every query against every caption."""
    room, kept = dict.fromkeys((tuple(words(query)) for query in queries if words(query)), maximum), set()
    for row in sorted(rows, key=_key):
        grams = {tuple(words(text)[at:to]) for text in row.captions for at in range(len(text)) for to in range(at + 1, len(text) + 1)}
        found = [query for query in room if query in grams]
        if (not found and keep_unmatched) or any(room[query] > 0 for query in found):
            kept.add(row.url)
            for query in found:
                room[query] -= 1
    return kept


@pytest.mark.parametrize("seed", range(12))
def test_balance_equals_its_slow_twin_in_any_order_of_the_list(seed, tmp_path):
    rng = random.Random(seed)
    vocabulary = ["red", "dog", "Dog's", "a-b", "été", "cat", "runs", "the", "x1"]

    def text(most: int) -> str:
        return rng.choice([" ", ", ", "  "]).join(rng.choice(vocabulary) for _ in range(rng.randint(0, most)))

    rows = [Row(f"http://a/{number}", tuple(text(6) for _ in range(rng.randint(1, 3)))) for number in range(80)]
    queries = [text(3) for _ in range(rng.randint(1, 25))] + ["the", "THE "]
    maximum, keep_unmatched = rng.choice([1, 3, 10]), rng.random() < 0.5
    expected = slow_balance(rows, queries, maximum, keep_unmatched)
    index = QueryIndex(queries)
    for order in (rows, rng.sample(rows, len(rows))):
        found = balance(order, index, maximum, keep_unmatched, tmp_path)
        assert {row.url for row, keep in zip(order, found.keep, strict=True) if keep} == expected
        assert found.matched.tolist() == [sum(number in index.find(row.captions) for row in rows) for number in range(len(index))]
        assert found.kept.tolist() == [
            sum(number in index.find(row.captions) for row in rows if row.url in expected) for number in range(len(index))
        ]
    assert not list(tmp_path.iterdir())


# Addresses and downloads


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
    ]
    + [
        (address, False)
        for address in ("0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "ff02::1")
    ]
    + [
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address, public):
    assert addresses.is_public(address) is public


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0177.0.0.1", "0x7f000001", "0X7F.1", "127.0x1", "127.0.0.1.", "１２７.1", "10.0.0.1"])
def test_addresses_in_other_forms_are_refused(host):
    with pytest.raises(addresses.PrivateAddress):
        addresses.check_literal(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111", "0x.example.org", "1.example", "123.com", "localhost"])
def test_names_and_public_addresses_are_left_to_the_resolver(host):
    addresses.check_literal(host)


def fetch(urls: list[str], download: DownloadSettings) -> list[bytes | Failure]:
    async def one(downloader: Downloader, url: str) -> bytes | Failure:
        async with downloader.fetch(url) as body:
            return body

    async def every() -> list[bytes | Failure]:
        async with Downloader(download, backlog=2) as downloader:
            return await asyncio.gather(*(one(downloader, url) for url in urls))

    return asyncio.run(every())


def test_loopback_is_refused_without_being_asked(server):
    server.faults()
    _, port = server.url.rsplit(":", 1)
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"]
    found = fetch([f"http://{host}:{port}/pictures/000.webp" for host in hosts], DownloadSettings(retries=0))
    assert [failure.reason for failure in found] == ["private address"] * len(hosts)
    assert server.requests() == []


def test_redirects_and_names_lead_to_public_places_only(server, monkeypatch):
    """The server's own address counts as public here; everything else as it is."""
    real, is_public = socket.getaddrinfo, addresses.is_public
    names = {"pictures.test": "127.0.0.1", "inside.test": "10.0.0.1"}

    def getaddrinfo(host, *arguments, **settings):
        if host == "gone.test":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(names.get(host, host), *arguments, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    server.faults()
    port = server.url.rsplit(":", 1)[1]
    redirect = f"http://pictures.test:{port}/redirect?url="
    places = {
        redirect + "/pictures/001.webp": None,
        redirect + "http://inside.test/x": "private address",
        redirect + f"http://127.0.0.2:{port}/pictures/001.webp": "private address",
        redirect + "http://169.254.169.254/latest": "private address",
        redirect + "file:///etc/passwd": "bad url",
        f"http://pictures.test:{port}/loop": "too many redirects",
        "http://gone.test/x": "dns",
        "ftp://pictures.test/x": "bad url",
        "not a url": "bad url",
        "http://[broken/x": "bad url",
        "http:///x": "bad url",
    }
    found = fetch(list(places), DownloadSettings(retries=0, redirects=3))
    assert [None if isinstance(body, bytes) else body.reason for body in found] == list(places.values())
    assert found[0] == (server.root / "001.webp").read_bytes()
    assert Counter(entry["path"].split("?")[0] for entry in server.requests()) == {"/redirect": 5, "/loop": 4, "/pictures/001.webp": 1}


def test_limits_of_one_download(server):
    server.faults()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
    places = ["hang", "endless", "said-long", "opted-out", "empty", "status/403", "status/429", "status/503"]
    download = DownloadSettings(allow_private=True, timeout=0.5, retries=1, backoff=0.01, max_bytes=100_000)
    found = dict(zip([*places, "nobody"], fetch([*(f"{server.url}/{place}" for place in places), nobody], download), strict=True))
    reasons = {
        "hang": "timeout",
        "endless": "too big",
        "said-long": "too big",
        "opted-out": "opted out",
        "empty": "empty answer",
        "nobody": "connection",
    }
    reasons |= {"status/403": "http 403", "status/429": "http 429", "status/503": "http 503"}
    assert {place: failure.reason for place, failure in found.items()} == reasons
    again = {"hang", "status/429", "status/503", "nobody"}
    assert {place: failure.tries for place, failure in found.items()} == {place: 2 if place in again else 1 for place in found}
    assert fetch([f"{server.url}/opted-out"], DownloadSettings(allow_private=True, ignore_opt_out=True)) == [b"picture"]


def test_what_nobody_expects_costs_one_row(server, pictures, monkeypatch):
    assert download._seconds("Mon, 01 Jan 2024 00:00:00 +99999999999999999") == 0.0
    server.faults()
    read = Downloader._read

    async def broken(self, url, response):
        if url.path.endswith("001.webp"):
            raise OverflowError("odd header")
        return await read(self, url, response)

    monkeypatch.setattr(Downloader, "_read", broken)
    found = fetch([f"{server.url}/pictures/{name}" for name in ("000.webp", "001.webp")], QUICK)
    assert found == [pictures["000.webp"][0], Failure("bad answer", "OverflowError: odd header")]

    def odd(*arguments):
        raise ZeroDivisionError("no side")

    monkeypatch.setattr(encode_pool, "prepare_image", odd)
    assert encode_pool.encode(b"x", ImageSettings(), Limits()) == Failure("unusable image", "ZeroDivisionError: no side")


# Gathering


def test_every_picture_arrives_once_with_its_caption_and_every_failure_has_its_reason(server, pictures, tmp_path):
    bad = {
        "/pictures/gone.webp": "http 404",
        "/page": "not an image",
        "/endless": "too big",
        "/redirect?url=ftp://x/y": "bad url",
        "/status/410": "http 410",
    }
    (server.root / "cut.webp").write_bytes(pictures["000.webp"][0][:200])
    bad["/pictures/cut.webp"] = "unusable image"
    others = [("a bad one", server.url + place) for place in bad]
    others += [("said again", f"{server.url}/pictures/007.webp"), ("moved", f"{server.url}/redirect?url=/pictures/000.webp")]
    path = picture_list(tmp_path / "list.tsv", server, pictures, others)
    server.faults(unavailable_every=7, half_every=11)
    out = tmp_path / "out"
    report = write_report(gather(settings(path, out, workers=2), print))
    expected = {f"{server.url}/pictures/{name}": (picture, captions[:1]) for name, (picture, captions) in pictures.items()}
    expected[f"{server.url}/pictures/007.webp"][1].append("said again")
    expected[f"{server.url}/redirect?url=/pictures/000.webp"] = (pictures["000.webp"][0], ["moved"])
    rows = gathered_rows(out)
    assert {row["image"]["path"]: (row["image"]["bytes"], row["caption"]) for row in rows} == expected and len(rows) == len(expected)
    assert [row["image"]["path"] for row in rows] == list(expected), "the order of the list"
    with (out / "failures.csv").open(newline="") as file:
        assert {row["url"]: row["reason"] for row in csv.DictReader(file)} == {server.url + place: reason for place, reason in bad.items()}
    assert report["failed"] == dict(Counter(bad.values()).most_common()) and report["kept"] == len(expected)
    assert report == json.loads((out / "report.json").read_text())
    answers = Counter(str(entry["answer"]) for entry in server.requests())
    assert answers["503"] > 5 and answers["half"] > 2
    with urllib.request.urlopen(server.url + MOST) as answer:
        assert 2 <= json.load(answer) <= QUICK.per_host
    facts = json.loads(pq.read_schema(out / "shard-00000.parquet").metadata[b"protoclip_scale.gather"])
    assert facts == report["list"] and len(facts["list_sha256"]) == 64
    reader = BlockReader(schema.Source(files="*.parquet"), str(out))
    read_back = [row for block in range(len(reader.block_rows)) for row in reader.read(block).to_pylist()]
    assert [(row["image"], row["captions"]) for row in read_back] == list(expected.values())


@pytest.mark.parametrize("place", ["prepare.written:2", "prepare.row_group:5"])
def test_killed_and_started_again_it_ends_with_the_same_bytes_and_asks_for_nothing_twice(server, pictures, tmp_path, place):
    path = picture_list(tmp_path / "list.tsv", server, pictures, [("gone", f"{server.url}/pictures/gone.webp")])
    server.faults()
    gather(settings(path, tmp_path / "whole"), print)
    out = tmp_path / "killed"
    command = ["--list", "conceptual_captions", str(path), "--out", str(out), "--format", "webp", "--allow-private", "--workers", "0"]
    command += ["--rows-per-shard", "16", "--row-group-rows", "5", "--shards-at-once", "1", "--max-bytes", str(QUICK.max_bytes)]
    assert _run(gather_images.main, 1, {"PROTOCLIP_KILL_AT": place}, [(command,)]) == [-9]
    assert list(shard_bytes(out)) == ["shard-00000.parquet"]
    server.faults()
    gather(settings(path, out, retry_failures=True), print)  # what is missing comes first
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole") and len(shard_bytes(out)) == 4
    asked = Counter(entry["path"] for entry in server.requests())
    assert set(asked) == {f"/pictures/{name}" for name in [*list(pictures)[16:], "gone.webp"]} and set(asked.values()) == {1}
    assert not list(out.glob(".*"))
    server.faults()
    gather(settings(path, out), print)
    assert server.requests() == []


def test_failed_rows_are_tried_again_into_further_shards(server, pictures, tmp_path):
    late = [f"late-{number}.webp" for number in range(20)]
    path = picture_list(tmp_path / "list.tsv", server, pictures, [(name, f"{server.url}/pictures/{name}") for name in late])
    out = tmp_path / "out"
    server.faults()
    assert write_report(gather(settings(path, out), print))["failed"] == {"http 404": 20}
    before = shard_bytes(out)
    for name in late[:18]:
        (server.root / name).write_bytes(pictures["003.webp"][0])
    server.faults()
    report = write_report(gather(settings(path, out, retry_failures=True), print))
    assert len(server.requests()) == 20 and report["failed"] == {"http 404": 2} and report["kept"] == len(pictures) + 18
    after = shard_bytes(out)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    assert sorted(row["caption"][0] for row in gathered_rows(out)[len(pictures) :]) == sorted(late[:18])
    server.faults()
    assert write_report(gather(settings(path, out), print)) == report and server.requests() == [], "not asked to, it tries nothing again"
    last = write_report(gather(settings(path, out, retry_failures=True), print))
    assert [each["shards"] for each in last["passes"]] == [[0, 5], [5, 7], [7, 8]] and last["passes"][2]["kept"] == 0
    for name in late[:18]:
        (server.root / name).unlink()
    (out / "shard-00001.parquet").unlink()
    with pytest.raises(UserError, match="shard-00001.parquet is gone"):
        gather(settings(path, out), print)


def test_queries_choose_what_is_downloaded(server, pictures, tmp_path):
    rows = [
        (f"{'a dog' if number % 3 else 'a cat'} number {number}", f"{server.url}/pictures/{name}") for number, name in enumerate(pictures)
    ]
    path = conceptual_list(tmp_path / "list.tsv", rows)
    (tmp_path / "queries.txt").write_text("a dog\nzebra\n")
    server.faults()
    chosen = settings(path, tmp_path / "out")
    listed = ListSettings(path, "conceptual_captions", rows_per_shard=16, queries=tmp_path / "queries.txt", max_per_query=9)
    gathered = gather(GatherSettings(**{**vars(chosen), "list": listed}), print)
    assert len(server.requests()) == 9 and all(row["caption"][0].startswith("a dog") for row in gathered_rows(tmp_path / "out"))
    assert gathered.listed["summary"]["queries"] == {
        "queries": 2,
        "queries_found": 1,
        "queries_over_the_maximum": 1,
        "pairs_without_query": 20,
        "pairs_kept": 9,
    }
    assert (tmp_path / "out" / "gather" / "query_counts.csv").read_text() == '"query","pairs","kept"\n"a dog",40,9\n"zebra",0,0\n'


def test_an_output_folder_belongs_to_one_list(server, pictures, tmp_path):
    path = picture_list(tmp_path / "list.tsv", server, pictures)
    out = tmp_path / "out"
    gather(settings(path, out), print)
    path.write_text(path.read_text() + "one more\thttp://a.example/x.jpg\n")
    with pytest.raises(UserError, match="was begun with list_sha256"):
        gather(settings(path, out), print)
    with pytest.raises(UserError, match="begun with rows_per_shard 16, now it is 7"):
        picture_list(path, server, pictures)
        gather(settings(path, out, rows_per_shard=7), print)
    for other, name in [({"row_group_rows": 6}, "row_group_rows 5"), ({"limits": Limits(9)}, "max_pixels"), ({"download": DownloadSettings(max_bytes=7)}, "max_bytes 1000000")]:
        with pytest.raises(UserError, match=f"begun with {name}"):
            gather(settings(path, out, **other), print)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match="holds parquet files of something else"):
        gather(settings(path, tmp_path / "other"), print)
    with (out / "gather" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="by another process"):
            gather(settings(path, out), print)


def _crashing(data: bytes, settings: ImageSettings, limits: Limits) -> bytes | Failure:
    if data.startswith(b"crash"):
        os._exit(139)
    return data.upper()


def test_an_image_that_crashes_its_decoder_costs_no_other(pictures):
    async def every(bodies: list[bytes]) -> list:
        async with EncodePool(2, ImageSettings(), Limits(), _crashing) as pool:
            return await asyncio.gather(*map(pool, bodies))

    bodies = [b"crash" if number == 3 else b"body %d" % number for number in range(5)]
    found = asyncio.run(every(bodies))
    assert [type(result) is Failure for result in found] == [body == b"crash" for body in bodies]
    assert all(result == body.upper() for body, result in zip(bodies, found, strict=True) if body != b"crash")


def test_the_tool_prints_a_table_and_one_line_for_errors(server, pictures, tmp_path, capsys):
    path = picture_list(tmp_path / "list.tsv", server, dict(list(pictures.items())[:5]), [("gone", f"{server.url}/pictures/gone.webp")])
    server.faults()
    command = [
        "--list",
        "conceptual_captions",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--allow-private",
        "--workers",
        "0",
        "--format",
        "webp",
    ]
    assert gather_images.main(command) == 0
    printed = capsys.readouterr().out
    assert "5 of 6 (83.3%) in 1 shard," in printed and "http 404" in printed and printed.rstrip().endswith(f"5 pairs in {tmp_path / 'out'}")
    for extra, message in [
        (["--connections", "0"], "--connections 0 is too small; give at least 1"),
        (["--keep-unmatched"], "have no effect without --queries"),
        (["--header", "x"], "--header has no effect with --list conceptual_captions"),
        (["--queries", "nowhere"], "--queries nowhere is not a file"),
    ]:
        assert gather_images.main([*command, *extra, "--out", str(tmp_path / "new")]) == 1
        assert message in capsys.readouterr().err
    assert gather_images.main(["--list", "csv", str(tmp_path / "nothing.csv"), "--out", str(tmp_path / "new")]) == 1
    assert "nothing.csv is not a file" in capsys.readouterr().err


def test_an_output_that_is_a_file_and_ctrl_c_are_one_line(tmp_path, capsys, monkeypatch):
    path = conceptual_list(tmp_path / "list.tsv", [("a", "http://a.example/1")])
    for out in (path, path / "x"):
        assert gather_images.main(["--list", "conceptual_captions", str(path), "--out", str(out)]) == 1
        assert f"--out {out} cannot be written" in one_line(capsys)
    monkeypatch.setattr(gather_images, "gather", interrupted)
    assert gather_images.main(["--list", "conceptual_captions", str(path), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.startswith("stopped")


def interrupted(*_):
    raise KeyboardInterrupt
