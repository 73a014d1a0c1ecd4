"""What compilers have made, as one archive that moves between machines: Triton's and Inductor's caches, our libraries.

Triton's and Inductor's own keys hold the sources, options and compilers, so what is out of date is not found and does
no harm. The libraries are used only if they were built from the same sources.
"""

import hashlib
import json
import os
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "fastmeta/*.so"
_SOURCES = ("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/*.py", "setup.py")
_KEY = "sources.txt"
# The same on the machine that compiles as on the one that runs: the first two are a part of Triton's keys.
COMPILING = {"TRITON_STORE_BINARY_ONLY": "1", "TRITON_DISABLE_LINE_INFO": "1"}


def default_folder() -> Path:
    """The same place for every run of a user, so that paths inside Inductor's files stay what they were."""
    return Path(tempfile.gettempdir()) / f"fastmeta-bench-{os.getuid()}"


def environment(folder: Path) -> dict[str, str]:
    """Has Triton and Inductor keep their caches there."""
    folders = {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return COMPILING | folders


def sources_key(root: Path = ROOT) -> str:
    """A hash of everything that the libraries are built from."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in root.glob(pattern)):
        found.update(path.relative_to(root).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def pack(archive: Path, folder: Path, root: Path = ROOT, *, built: bool = True) -> int:
    """Write the archive of a cache folder, whole or not at all; returns its size in bytes.

    ``built``: the libraries in the source tree are known to be of its sources; others are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _KEY).write_text(sources_key(root))
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(f"{archive.name}.{os.getpid()}")
    with tarfile.open(part, "w:gz", compresslevel=3) as file:
        file.add(folder, "caches", filter=_wanted)
        for library in sorted(root.glob(LIBRARIES)) if built else ():
            file.add(library, f"libraries/{library.name}")
    part.replace(archive)
    return archive.stat().st_size


def _wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files and folders that are whole: no locks, nothing that a compiler still writes."""
    name = Path(member.name).name
    unwanted = name == "lock" or name.endswith(".lock") or name.startswith("tmp.") or ".tmp." in name
    return None if unwanted or not (member.isfile() or member.isdir()) else member


def unpack(archive: Path, folder: Path, root: Path = ROOT) -> list[str]:
    """Read the archive into the cache folder and its libraries into the source tree.

    Returns:
        the names of the libraries that are now in place: those of an archive of the same sources.
    """
    if not archive.exists():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:

        def members(prefix: str) -> list[tarfile.TarInfo]:
            found = [member for member in file.getmembers() if member.name.startswith(prefix)]
            return [member.replace(name=member.name.removeprefix(prefix), deep=False) for member in found]

        file.extractall(folder, members("caches/"), filter="data")
        relocate(folder / "triton")
        key = folder / _KEY
        if not key.exists() or key.read_text() != sources_key(root):
            return []
        libraries = members("libraries/")
        file.extractall(root / Path(LIBRARIES).parent, libraries, filter="data")
    return [member.name for member in libraries]


def relocate(folder: Path) -> None:
    """Triton keeps absolute paths in the list of each kernel's files; have them name this folder."""
    for path in folder.glob("*/__grp__*.json"):
        group = json.loads(path.read_text())
        group["child_paths"] = {name: str(path.parent / Path(old).name) for name, old in group["child_paths"].items()}
        path.write_text(json.dumps(group))
