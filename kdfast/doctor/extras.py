"""Which of the optional parts are installed, by the requirements that the installed package states."""

from __future__ import annotations

import re
from importlib import metadata

from torch.torch_version import TorchVersion

OF_DEVELOPMENT = ("test", "docs", "dev")
FOR = {
    "cli": "the command kdfast",
    "train": "recipes, DistillationTrainer, teacher caches, results",
    "prune": "criteria that cluster neurons",
    "integrations": "kdfast.integrations, for TRL and sentence-transformers",
    "bench": "kdfast bench",
}
REQUIREMENT = re.compile(
    r"""(?P<name>[\w.-]+) \s* (\[(?P<extras>[\w\s,-]+)\])? \s* \(?(?P<versions>[^;()]*)\)?
    \s* (;.*extra\s*==\s*["'](?P<of>[\w-]+)["'])?""",
    re.X,
)


def names() -> list[str]:
    """All optional parts; none where kdfast is used from its folder, not installed."""
    try:
        return metadata.metadata("kdfast").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


def lacking(extra: str) -> list[str]:
    """What a part needs and this environment has not, each as "name>=version (what there is)"."""
    found: list[str] = []
    for requirement in metadata.requires("kdfast") or []:
        parts = REQUIREMENT.match(requirement)
        if parts is None or parts["of"] != extra:
            continue
        if parts["name"] == "kdfast":
            for other in parts["extras"].split(","):
                found += [one for one in lacking(other.strip()) if one not in found]
            continue
        there = _version(parts["name"])
        if there is None or any(TorchVersion(there) < least for least in _least(parts["versions"])):
            found.append(f"{parts['name']}{parts['versions'].strip()} ({there or 'none'})")
    return found


def remedy(extra: str) -> str:
    return f"pip install kdfast[{extra}]"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _least(versions: str) -> list[str]:
    return re.findall(r"[>~]=\s*([\w.]+)", versions)
