"""Where a record comes from: device, versions, date, commit, and the package's own files."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import pathlib
import subprocess
from typing import Any

import jax

from fdpp_jax._version import __version__
from fdpp_jax.plans import device

_PACKAGE = pathlib.Path(__file__).parents[1]


def provenance() -> dict[str, Any]:
    """Device, versions, date and commit of a run, and git's id of the package's folder as it ran."""
    running = device.current()
    return {
        "device": dataclasses.asdict(running) | {"jax_kind": jax.devices()[0].device_kind},
        "versions": {"fdpp_jax": __version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "package_tree": git_tree(_PACKAGE).hex(),
    }


def _commit() -> str | None:
    """The checkout's commit, "-dirty" if changed since; None where the package is installed or git is missing."""
    checkout = _PACKAGE.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def git_tree(folder: pathlib.Path) -> bytes:
    """The id that git gives to the folder with its files as they are, without `__pycache__`.

    Source: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    """
    entries = []
    for path in folder.iterdir():
        if not path.is_dir():
            entries.append((path.name, b"100644", _git_id(b"blob", path.read_bytes())))
        elif path.name != "__pycache__" and (tree := git_tree(path)) != _EMPTY:
            entries.append((f"{path.name}/", b"40000", tree))
    return _git_id(
        b"tree",
        b"".join(b"%b %b\0%b" % (mode, name.rstrip("/").encode(), entry) for name, mode, entry in sorted(entries)),
    )


def _git_id(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).digest()


_EMPTY = _git_id(b"tree", b"")  # git keeps no empty folder
