"""Published weights by name, from a server on this machine: cut connections, wrong hashes, files that have moved."""

import hashlib
import http.server
import io
import re
import threading
from pathlib import Path

import pytest
import torch

from segtrain.errors import DataError, UsageError
from segtrain.weights import download
from segtrain.weights.download import fetched, known_by_word, weights_file
from tests.helpers.runs import refused

NAME = "torchvision:resnet18"
FILE = "resnet18-f37072fd.pth"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `cut`: bytes that each answer has at most, the next ones by the next connection."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.status = b"", 1 << 30, True, 200
        self.asked: list[tuple[str, str | None]] = []  # path and Range of each request
        self.link = f"http://127.0.0.1:{self.server_address[1]}/{FILE}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, span = self.server, self.headers["Range"]
        server.asked.append((self.path, span))
        if server.status != 200:
            self.send_error(server.status)
            return
        first = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and server.ranges else 0
        if first and first >= len(server.content):
            self.send_error(416)
            return
        rest = server.content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """With the published link and hash of resnet18 replaced by this server's, and an empty cache."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    buffer = io.BytesIO()
    torch.save({"layer1.0.conv1.weight": torch.arange(50_000.0)}, buffer)
    made.content = buffer.getvalue()
    known = known_by_word(NAME)
    monkeypatch.setitem(known, "link", made.link)
    monkeypatch.setitem(known, "sha256", hashlib.sha256(made.content).hexdigest()[:8])
    monkeypatch.setenv("SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def cached(tmp_path, name=FILE):
    return tmp_path / "cache" / "weights" / name


def test_a_file_is_downloaded_once(server, tmp_path):
    path = weights_file(NAME)
    assert path == cached(tmp_path) and path.read_bytes() == server.content
    assert weights_file(NAME) == path and len(server.asked) == 1
    assert not cached(tmp_path, f"{FILE}.part").exists()


def test_a_cut_connection_goes_on_where_it_ended(server):
    server.cut = 30_000
    assert weights_file(NAME).read_bytes() == server.content
    assert len(server.asked) == -(-len(server.content) // 30_000)
    assert [span for _, span in server.asked[:3]] == [None, "bytes=30000-", "bytes=60000-"]


def test_another_command_goes_on_where_the_first_was_killed(server, tmp_path):
    cached(tmp_path).parent.mkdir(parents=True)
    cached(tmp_path, f"{FILE}.part").write_bytes(server.content[:70_000])
    assert weights_file(NAME).read_bytes() == server.content
    assert [span for _, span in server.asked] == ["bytes=70000-"]


def test_a_server_without_ranges_gives_it_from_the_beginning(server, tmp_path):
    server.ranges = False
    cached(tmp_path).parent.mkdir(parents=True)
    cached(tmp_path, f"{FILE}.part").write_bytes(b"x" * 70_000)
    assert weights_file(NAME).read_bytes() == server.content


def test_a_part_that_is_longer_than_the_file_is_dropped(server, tmp_path):
    cached(tmp_path).parent.mkdir(parents=True)
    cached(tmp_path, f"{FILE}.part").write_bytes(b"x" * 900_000)
    assert weights_file(NAME).read_bytes() == server.content
    assert len(server.asked) == 2


def test_connections_that_bring_nothing_end_it_and_what_there_is_stays(server, tmp_path):
    part = cached(tmp_path, f"{FILE}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(server.content[:500])
    server.cut = 0
    with pytest.raises(DataError, match=r"the connection was cut\); 500 bytes are kept, and the same command goes on"):
        weights_file(NAME)
    assert len(server.asked) == download.TRIES
    assert part.read_bytes() == server.content[:500] and not cached(tmp_path).exists()


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    server.content = b"<html>log in</html>"
    with pytest.raises(DataError, match=r"does not give the published file: its sha256 begins with [0-9a-f]{8}, not"):
        weights_file(NAME)
    assert not cached(tmp_path).exists() and not cached(tmp_path, f"{FILE}.part").exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    weights_file(NAME).write_bytes(b"cut short")
    assert weights_file(NAME).read_bytes() == server.content


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (410, 1), (403, 1), (503, download.TRIES)])
def test_a_file_that_is_not_there(server, tmp_path, status, tries):
    server.status = status
    with pytest.raises(DataError) as caught:
        weights_file(NAME)
    text = str(caught.value)
    assert f"answers {status}" in text and server.link in text and f"put it at {cached(tmp_path)}" in text
    assert ("has moved" in text) == (tries == 1)
    assert len(server.asked) == tries


def test_offline(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError) as caught:
        weights_file(NAME)
    text = str(caught.value)
    assert text.startswith(f"cannot download {server.link} (") and f"put it at {cached(tmp_path)}" in text
    assert "\n" not in text and "goes on" not in text


def test_proxies_of_the_environment_are_used(server, monkeypatch):
    """A proxy is asked for the whole address."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setitem(known_by_word(NAME), "link", f"http://weights.example/{FILE}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert weights_file(NAME).read_bytes() == server.content
    assert server.asked[0][0] == f"http://weights.example/{FILE}"


def test_torchs_own_cache_is_looked_at(server, tmp_path):
    place = tmp_path / "torch" / "hub" / "checkpoints" / FILE
    place.parent.mkdir(parents=True)
    place.write_bytes(server.content)
    assert weights_file(NAME) == place and not server.asked
    place.write_bytes(b"damaged")
    assert weights_file(NAME) == cached(tmp_path)


def test_several_processes_download_it_once(server):
    server.cut = 50_000
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(weights_file(NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3 and found[0].read_bytes() == server.content
    assert len(server.asked) == -(-len(server.content) // 50_000)


def test_names():
    assert known_by_word(NAME)["file"] == FILE
    assert known_by_word("torchvision:resnet50")["file"] == "resnet50-11ad3fa6.pth"  # torchvision's DEFAULT
    assert known_by_word("torchvision:resnet50-0676ba61")["file"] == "resnet50-0676ba61.pth"
    assert known_by_word("torchvision:deeplabv3_resnet50_coco")["classes"] == 21
    assert known_by_word("resnext101_ipabn_lr_512.pth.tar")["name"] == "resnext101_ipabn_lr_512"
    with pytest.raises(
        UsageError, match=r"no published weights 'torchvision:resnet5'; did you mean torchvision:resnet"
    ):
        known_by_word("torchvision:resnet5")
    with pytest.raises(UsageError, match="resnext101_ipabn_lr_512"):
        known_by_word("resnext101_ipabn")


def test_a_file_behind_a_page_is_left_to_the_user(server, tmp_path):
    known = known_by_word("wide_resnet38_deeplab_vistas")
    with pytest.raises(DataError, match=r"behind a page of Google Drive.*drive.google.com.*put it at .*\.pth\.tar"):
        fetched(known)
    assert not server.asked


def test_the_command(server, segtrain, tmp_path):
    answer = segtrain("weights", f"fetch={NAME}", "output=here.pth")
    assert answer.status == 0, answer
    assert Path("here.pth").read_bytes() == server.content
    lines = answer.out.splitlines()
    assert lines[0] == f"download   {server.link} -> here.pth" and lines[-1] == "here.pth"
    for text in (
        "licence    torchvision's code",
        f"sha256     {hashlib.sha256(server.content).hexdigest()}",
        server.link,
    ):
        assert text in answer.out
    answer = segtrain("weights", f"fetch={NAME}")
    assert answer.out.splitlines()[-1] == str(cached(tmp_path))
    assert segtrain("weights", f"fetch={NAME}", "output=there.pth").status == 0 and len(server.asked) == 2
    assert Path("there.pth").read_bytes() == server.content
    refused(segtrain("weights", "output=x.pth"), "it is for fetch=NAME")
    refused(segtrain("weights", "fetch=resnet19"), "there are no published weights 'resnet19'")


def test_a_training_asks_for_the_file_before_the_data(server, segtrain, folder_data):
    server.status = 404
    answer = segtrain("train", *folder_data[1], f"model.weights={NAME}", "run=r")
    refused(answer, "the file has moved", "model.weights=FILE or none", status=1)
    refused(
        segtrain("train", *folder_data[1], "model.weights=torchvision:resnet19"), "did you mean torchvision:resnet1"
    )
