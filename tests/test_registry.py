"""The registry: every byte is verified, whatever goes wrong is one clear error, and nothing half-written is left."""

import hashlib
import http.server
import os
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pooch
import pytest

from recsys_importance.data import registry
from recsys_importance.data.registry import DATASETS, Dataset, DatasetUnavailable, File, card, fetch, locate

CONTENT = b"query,product\nred mug,Mug red\n"
KEY = "mugs/folder/mugs.csv"
ABOUT = dict(title="Mugs", rows="1", columns="query, product", licence="CC0", citation="none", home="none", simulated=True, noise="none")


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no override; the machine's own are out of reach."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(registry, "cache_folder", lambda: folder)
    monkeypatch.setattr(registry.time, "sleep", lambda seconds: None)
    monkeypatch.delenv(registry.OVERRIDE, raising=False)
    return folder


@pytest.fixture
def register(monkeypatch):
    def add(url, *, name="mugs", key=KEY, **expected):
        expected = expected or {"sha256": hashlib.sha256(CONTENT).hexdigest()}
        monkeypatch.setitem(DATASETS, name, Dataset(name=name, files=(File(key=key, url=url, **expected),), **ABOUT))
        return key

    return add


class Server:
    """A local server: `pages` maps a path to bytes; `requests` counts what was asked for."""

    def __init__(self):
        self.pages, self.requests, self.cut = {}, [], False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                body = outer.pages.get(self.path)
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if outer.cut else body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # a client that hangs up is part of some tests
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def closed_address():
    """An address on this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/mugs.csv"


def test_download_is_verified_shown_and_done_once(cache, register, server, capfd):
    server.pages["/mugs.csv"] = CONTENT
    key = register(f"{server.url}/mugs.csv")
    assert locate(key) is None and server.requests == []
    path = fetch(key)
    assert path == cache / KEY and path.read_bytes() == CONTENT
    assert fetch(key) == locate(key) == path
    assert server.requests == ["/mugs.csv"]
    assert files_under(cache) == [KEY]
    shown = capfd.readouterr().err
    assert KEY in shown and f"{len(CONTENT)}.0/{len(CONTENT)}.0" in shown


def test_git_blob_id_is_git_own(cache, register, server):
    server.pages["/mugs.csv"] = CONTENT
    blob = subprocess.run(["git", "hash-object", "--stdin"], input=CONTENT, capture_output=True, check=True).stdout.decode().strip()
    assert fetch(register(f"{server.url}/mugs.csv", git_blob=blob)).read_bytes() == CONTENT
    wrong = register(f"{server.url}/mugs.csv", name="cups", key="cups/mugs.csv", git_blob="0" * 40)
    with pytest.raises(ValueError, match=f"have git blob {blob}, expected git blob {'0' * 40}"):
        fetch(wrong)
    assert files_under(cache) == [KEY]


def test_wrong_bytes_are_refused_and_not_kept(cache, register, server):
    server.pages["/mugs.csv"] = b"<html>log in to the network</html>"
    key = register(f"{server.url}/mugs.csv")
    found, expected = hashlib.sha256(server.pages["/mugs.csv"]).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(ValueError, match=f"sha256 {found}, expected sha256 {expected}. Nothing was kept") as error:
        fetch(key)
    assert "\n" not in str(error.value) and registry.OVERRIDE in str(error.value)
    assert files_under(cache) == []


@pytest.mark.parametrize("damaged", [CONTENT[:7], b"", CONTENT + b"x"], ids=["truncated", "empty", "tampered"])
def test_damaged_cache_file_is_replaced(cache, register, server, damaged):
    server.pages["/mugs.csv"] = CONTENT
    key = register(f"{server.url}/mugs.csv")
    (cache / key).parent.mkdir(parents=True)
    (cache / key).write_bytes(damaged)
    assert locate(key) is None
    assert fetch(key).read_bytes() == CONTENT
    assert files_under(cache) == [KEY]


def test_no_network_is_one_error_and_leaves_nothing(cache, register, closed_address):
    key = register(closed_address)
    with pytest.raises(DatasetUnavailable) as error:
        fetch(key)
    message = str(error.value)
    for part in (KEY, closed_address, str(cache), registry.OVERRIDE, "'shop'", "ConnectionError"):
        assert part in message
    assert "\n" not in message and isinstance(error.value, OSError)
    assert files_under(cache) == []


def test_no_network_names_the_override_folder_too(cache, register, closed_address, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv(registry.OVERRIDE, str(tmp_path / "mine"))
    with pytest.raises(DatasetUnavailable, match=f"is not in {tmp_path / 'mine'} .{registry.OVERRIDE}. or {cache}"):
        fetch(register(closed_address))


def test_missing_page_and_cut_connection(cache, register, server):
    with pytest.raises(DatasetUnavailable, match="HTTP status 404"):
        fetch(register(f"{server.url}/nowhere.csv"))
    server.pages["/mugs.csv"], server.cut = CONTENT * 1000, True
    with pytest.raises(DatasetUnavailable, match="cannot be downloaded"):
        fetch(register(f"{server.url}/mugs.csv"))
    assert files_under(cache) == []


def test_second_try_succeeds(cache, register, monkeypatch):
    tries = []

    def flaky(self, url, output_file, pooch):
        tries.append(url)
        output_file.write(CONTENT[: 3 if len(tries) == 1 else None])
        if len(tries) == 1:
            raise ConnectionResetError("cut")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", flaky)
    assert fetch(register("http://example.org/mugs.csv")).read_bytes() == CONTENT
    assert len(tries) == 2


def test_interruption_leaves_nothing(cache, register, monkeypatch):
    def interrupted(self, url, output_file, pooch):
        output_file.write(CONTENT[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(register("http://example.org/mugs.csv"))
    assert files_under(cache) == []


def test_many_at_once_all_get_the_whole_file(cache, register, server):
    """Threads here stand for processes: each writes under a name of its own and moves the file in one step."""
    server.pages["/mugs.csv"] = CONTENT * 5000
    key = register(f"{server.url}/mugs.csv", sha256=hashlib.sha256(CONTENT * 5000).hexdigest())
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(fetch, [key] * 8))
    assert set(paths) == {cache / KEY} and paths[0].read_bytes() == CONTENT * 5000
    assert files_under(cache) == [KEY]


def test_a_folder_under_the_files_name_in_the_cache(cache, register, server):
    server.pages["/mugs.csv"] = CONTENT
    (cache / KEY / "inside").mkdir(parents=True)
    with pytest.raises(DatasetUnavailable, match="cannot be downloaded .IsADirectoryError"):
        fetch(register(f"{server.url}/mugs.csv"))
    assert files_under(cache) == []


def test_a_folder_under_the_files_name_in_the_override(cache, register, server, tmp_path, monkeypatch):
    server.pages["/mugs.csv"] = CONTENT
    (tmp_path / "mine" / KEY).mkdir(parents=True)
    monkeypatch.setenv(registry.OVERRIDE, str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="is a folder, not the file"):
        fetch(register(f"{server.url}/mugs.csv"))
    assert server.requests == []


def test_more_bytes_than_the_registry_knows_are_cut_off(cache, register, server):
    """A source that sends without end fills no disk: it is left at the first piece beyond the known length."""
    server.pages["/mugs.csv"] = bytes(50 << 20)
    expected = dict(sha256=hashlib.sha256(CONTENT).hexdigest(), size_bytes=len(CONTENT))
    with pytest.raises(registry.WrongDownload, match=f"more than the {len(CONTENT)} bytes expected. Nothing was kept"):
        fetch(register(f"{server.url}/mugs.csv", **expected))
    assert files_under(cache) == [] and len(server.requests) == 1


def test_override_comes_first_and_is_never_written(cache, register, server, tmp_path, monkeypatch):
    server.pages["/mugs.csv"] = CONTENT
    key = register(f"{server.url}/mugs.csv")
    mine = tmp_path / "mine"
    (mine / key).parent.mkdir(parents=True)
    (mine / key).write_bytes(CONTENT)
    for path in [mine / key, (mine / key).parent]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    monkeypatch.setenv(registry.OVERRIDE, str(mine))
    assert fetch(key) == mine / key
    assert server.requests == [] and not cache.exists() and files_under(mine) == [key]
    (mine / key).parent.chmod(0o755)


def test_wrong_file_in_the_override_is_an_error_not_a_download(cache, register, server, tmp_path, monkeypatch):
    server.pages["/mugs.csv"] = CONTENT
    key = register(f"{server.url}/mugs.csv")
    (tmp_path / "mine" / key).parent.mkdir(parents=True)
    (tmp_path / "mine" / key).write_bytes(CONTENT[:-1])
    monkeypatch.setenv(registry.OVERRIDE, str(tmp_path / "mine"))
    for action in (locate, fetch):
        with pytest.raises(ValueError) as error:
            action(key)
        message = str(error.value)
        for part in (str(tmp_path / "mine" / key), hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(CONTENT[:-1]).hexdigest(), "unset"):
            assert part in message
    assert server.requests == [] and (tmp_path / "mine" / key).read_bytes() == CONTENT[:-1]


def test_override_without_the_file_falls_through_to_the_cache(cache, register, server, tmp_path, monkeypatch):
    server.pages["/mugs.csv"] = CONTENT
    key = register(f"{server.url}/mugs.csv")
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv(registry.OVERRIDE, str(tmp_path / "mine"))
    assert fetch(key) == cache / key
    assert files_under(tmp_path / "mine") == []


def test_override_that_is_no_folder(cache, register, tmp_path, monkeypatch):
    monkeypatch.setenv(registry.OVERRIDE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere', which is not a folder"):
        fetch(register("http://example.org/mugs.csv"))


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else False, reason="root may write everywhere")
def test_cache_that_cannot_be_written(cache, register, server):
    server.pages["/mugs.csv"] = CONTENT
    cache.mkdir()
    cache.chmod(0o555)
    with pytest.raises(DatasetUnavailable, match="PermissionError"):
        fetch(register(f"{server.url}/mugs.csv"))
    cache.chmod(0o755)


def test_cache_folder_that_is_a_file(cache, register, server):
    server.pages["/mugs.csv"] = CONTENT
    cache.write_text("in the way")
    with pytest.raises(DatasetUnavailable, match="cannot be downloaded .(NotADirectory|FileExists)Error"):
        fetch(register(f"{server.url}/mugs.csv"))
    assert cache.read_text() == "in the way"


def carried(tmp_path, monkeypatch, content):
    """A package on the path whose code must not run, with one data file."""
    package = tmp_path / "site" / "carrier"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (package / "data" / "mugs.csv").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return package / "data" / "mugs.csv"


def test_file_of_a_package_without_importing_it(cache, register, tmp_path, monkeypatch):
    path = carried(tmp_path, monkeypatch, CONTENT)
    assert fetch(register("pip:carrier==1.2/data/mugs.csv")) == path
    assert "carrier" not in sys.modules


def test_file_of_a_package_of_another_version(cache, register, tmp_path, monkeypatch):
    carried(tmp_path, monkeypatch, CONTENT + b"more")
    with pytest.raises(ValueError, match="another version: pip install carrier==1.2"):
        fetch(register("pip:carrier==1.2/data/mugs.csv"))


def test_missing_package(cache, register):
    with pytest.raises(
        DatasetUnavailable, match="installed packages; the package that carries it is missing: pip install nowhere_to_be_found==1.2"
    ):
        fetch(register("pip:nowhere_to_be_found==1.2/data/mugs.csv"))


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'chorus/1.json.zip'"):
        fetch("chorus/1.json")
    with pytest.raises(ValueError, match="known: chorus, online_retail, obd, wands, esci, shop"):
        fetch("nothing/at/all.csv")
    with pytest.raises(ValueError, match="did you mean 'chorus'"):
        card("korus")


def test_a_file_needs_exactly_one_hash():
    with pytest.raises(ValueError, match="exactly one of sha256 and git_blob"):
        File(key="x/y", url="http://example.org")
    with pytest.raises(ValueError, match="exactly one of sha256 and git_blob"):
        File(key="x/y", url="http://example.org", sha256="0" * 64, git_blob="0" * 40)


@pytest.mark.parametrize("wrong", [0, -1, 3.0, True, "3"])
def test_a_data_set_says_what_its_labels_are(wrong):
    with pytest.raises(ValueError, match="mugs: highest_grade is .*; expected the grade that the label 1 stands for, or None"):
        Dataset(name="mugs", files=(), **ABOUT, highest_grade=wrong)
    assert card("esci").loc["label", "value"] == "the gain of NDCG itself"
    assert card("wands").loc["label", "value"] == "grade / 2; the gain of NDCG is 2^grade - 1"


def test_registry_is_well_formed():
    assert list(DATASETS) == ["chorus", "online_retail", "obd", "wands", "esci", "shop"]
    files = [file for dataset in DATASETS.values() for file in dataset.files]
    assert len({file.key for file in files}) == len(files)
    for name, dataset in DATASETS.items():
        assert dataset.name == name and dataset.simulated == (name == "shop")
        assert all(file.key.startswith(f"{name}/") for file in dataset.files)
    for file in files:
        digest, length = (file.sha256, 64) if file.sha256 else (file.git_blob, 40)
        assert len(digest) == length and set(digest) <= set("0123456789abcdef")
        # An address that names a branch would change under the hash.
        assert file.url.startswith("pip:obp==0.4.1/") or any(len(part) == 40 and part.isalnum() for part in file.url.split("/"))


@pytest.mark.parametrize("name", list(DATASETS))
def test_card_holds_every_fact_of_the_registry(name):
    dataset, table = DATASETS[name], card(name)["value"]
    assert table["real or simulated"] == ("simulated" if name == "shop" else "real")
    for label, value in {
        "licence": dataset.licence,
        "citation": dataset.citation,
        "known noise": dataset.noise,
        "rows": dataset.rows,
    }.items():
        assert table[label] == value and value
    for file in dataset.files:
        assert file.hash in table[f"file {file.key}"] and file.url in table[f"file {file.key}"]


def test_card_sizes_and_escaping(monkeypatch):
    assert card("chorus").loc["size", "value"] == "6.5 MB in 5 files"  # 182,092 + 1,558,268 + 1,643,302 + 1,662,955 + 1,422,844 bytes
    assert card("shop").loc["size", "value"] == "no files"
    assert card("wands").loc["size", "value"] == "not published"
    monkeypatch.setitem(DATASETS, "odd", Dataset(name="odd", files=(), **(ABOUT | {"title": "<script>alert(1)</script>"})))
    assert "<script>" not in card("odd")._repr_html_()


def test_real_files_here_have_the_registered_hashes_and_lengths():
    """Every file that is on this machine; skipped where none is."""
    here = [(file, path) for dataset in DATASETS.values() for file in dataset.files if (path := locate(file.key))]
    if not here:
        pytest.skip("no registered file on this machine (no override folder, no cache, no obp)")
    for file, path in here:
        found = hashlib.sha256(path.read_bytes()).hexdigest() if file.sha256 else registry._hash_of(path, file).split()[-1]
        assert found == (file.sha256 or file.git_blob)
        assert file.size_bytes is None or path.stat().st_size == file.size_bytes
