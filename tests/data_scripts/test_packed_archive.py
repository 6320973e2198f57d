import json
import random
import shutil
import tarfile

import pytest

from data_scripts import packed_archive
from data_scripts.packed_archive import main, pack, unpack, verify
from recipes.data import PackedTokens


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed_archive, "BLOCK", 1 << 16)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_unpacking_gives_the_same_bytes(built_in, tmp_path, small_blocks):
    folder, manifest = built_in
    (path,) = pack(folder, tmp_path / "small.tar", progress=False)
    assert path.stat().st_size < 0.75 * sum(map(len, content(folder).values()))
    assert len(verify(path, progress=False)["blocks"]) > 8
    assert unpack(path, tmp_path / "again", progress=False) == manifest
    assert content(tmp_path / "again") == content(folder)
    rows, again = (PackedTokens(place, "train", 128) for place in (folder, tmp_path / "again"))
    assert all((rows[i]["input_ids"] == again[i]["input_ids"]).all() for i in range(0, len(rows), 50))


def test_parts_are_small_enough_and_the_same_for_any_number_of_threads(built_in, tmp_path, small_blocks):
    folder, _ = built_in
    limit = 0.1
    one, two = (pack(folder, tmp_path / name / "small.tar", part_mib=limit, workers=workers, progress=False)
                for name, workers in (("one", 1), ("two", 3)))
    assert len(one) > 2 and [p.name for p in one] == [p.name for p in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two))
    assert max(p.stat().st_size for p in one) <= limit * 2**20
    for named in (tmp_path / "one" / "small.tar", one[1]):  # by the name of all, or any part
        unpack(named, tmp_path / "again", workers=2, progress=False)
        assert content(tmp_path / "again") == content(folder)


def test_missing_and_damaged_parts_are_named(built_in, tmp_path, small_blocks):
    parts = pack(built_in[0], tmp_path / "small.tar", part_mib=0.1, progress=False)
    kept = {path: path.read_bytes() for path in parts}
    parts[1].unlink()
    with pytest.raises(ValueError, match=rf"1 of {len(parts)} parts are missing in .*: small-00002-of-\d+\.tar"):
        unpack(tmp_path / "small.tar", tmp_path / "again", progress=False)
    rng = random.Random(0)
    for trial in range(12):
        for path, data in kept.items():
            path.write_bytes(data)
        victim = rng.choice(parts)
        data = bytearray(kept[victim])
        if trial % 3 == 0:
            data = data[:len(data) // 2]
        else:  # anywhere in a block's content
            with tarfile.open(victim) as tar:
                member = rng.choice(tar.getmembers()[1:])
            data[member.offset_data + rng.randrange(member.size)] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        with pytest.raises(ValueError, match=victim.name):
            unpack(tmp_path / "small.tar", tmp_path / "again", progress=False)
        assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))


def test_a_damaged_data_set_is_not_packed(built_in, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(built_in[0], folder)
    path = folder / "train-00001.bin"
    path.write_bytes(b"\x07" + path.read_bytes()[1:])
    for command, message in ((["pack", str(folder), str(tmp_path / "a.tar")], "train-00001.bin has another sha256"),
                             (["pack", str(tmp_path), str(tmp_path / "a.tar")], "no manifest.json"),
                             (["pack", str(built_in[0]), "a.zip"], "must end in .tar"),
                             (["pack", str(built_in[0]), "a.tar", "--part_mib", "3"], "part_mib=3.0 must be above 16"),
                             (["unpack", str(tmp_path / "b.tar"), str(folder)], "b.tar is no file")):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2 and message in capsys.readouterr().err
    path.unlink()
    with pytest.raises(ValueError, match="train-00001.bin is missing"):
        pack(folder, tmp_path / "a.tar", progress=False)
    assert not list(tmp_path.glob("*.tar"))


def test_parts_of_an_earlier_archive_are_removed(built_in, tmp_path, small_blocks):
    many, fewer = ([p.name for p in pack(built_in[0], tmp_path / "small.tar", part_mib=mib, progress=False)]
                   for mib in (0.1, 0.2))
    assert len(many) > len(fewer) and sorted(p.name for p in tmp_path.glob("*.tar")) == fewer
    (tmp_path / "small-notes.tar").write_bytes(b"another's")
    pack(built_in[0], tmp_path / "small.tar", progress=False)
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == ["small-notes.tar", "small.tar"]
    pack(built_in[0], tmp_path / "small.tar", part_mib=0.2, progress=False)
    assert not (tmp_path / "small.tar").exists()
    with pytest.raises(ValueError, match="part_mib leaves .* a block needs"):
        packed_archive._assign_parts([{"size": 1_000}, {"size": 90_000}], 80_000)


@pytest.mark.parametrize("name", ["../outside.bin", "/tmp/outside.bin", "tokenizer/../../outside.bin"])
def test_an_archive_cannot_write_outside_of_its_folder(built_in, tmp_path, name):
    (path,) = pack(built_in[0], tmp_path / "a.tar", progress=False)
    with tarfile.open(path) as tar:
        members = [(entry, tar.extractfile(entry).read()) for entry in tar.getmembers()]
    index = json.loads(members[0][1])
    index["blocks"][1]["file"] = name
    with tarfile.open(path, "w") as tar:
        for entry, data in [(tarfile.TarInfo("archive.json"), json.dumps(index).encode()), *members[1:]]:
            packed_archive._member(tar, entry.name, data)
    with pytest.raises(ValueError, match="outside of the folder"):
        unpack(path, tmp_path / "deep" / "out", progress=False)
    assert not list(tmp_path.rglob("outside*"))


def test_command_line(built_in, tmp_path, capsys):
    main(["pack", str(built_in[0]), str(tmp_path / "small.tar")])
    assert "small.tar" in capsys.readouterr().out
    main(["verify", str(tmp_path / "small.tar")])
    main(["unpack", str(tmp_path / "small.tar"), str(tmp_path / "again")])
    assert "all checksums match" in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "manifest.json").read_text()) == built_in[1]
