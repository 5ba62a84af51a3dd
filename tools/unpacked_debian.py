"""Debian packages, unpacked but never installed, for tools that need a program or kernel other than the machine's.

Packages come from the machine's own Debian mirror, with an apt state of our own, so that neither its configuration
nor its package lists change; nothing here needs root.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_SOURCES = Path("/etc/apt")


def configured_mirrors() -> Iterator[tuple[str, str]]:
    """Yield (address, suite) of every binary source that the machine's apt knows, deb822 files and one-line files."""
    for path in sorted(APT_SOURCES.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)):
            fields = dict(re.findall(r"^(\S+):\s*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE))
            if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes") != "no":
                yield from ((uri, suite) for uri in fields["URIs"].split() for suite in fields["Suites"].split())
    for path in [APT_SOURCES / "sources.list", *sorted(APT_SOURCES.glob("sources.list.d/*.list"))]:
        for line in path.read_text().splitlines() if path.exists() else []:
            if match := re.match(r"deb\s+(?:\[.*?\]\s+)?(\S+)\s+(\S+)", line):
                yield match[1], match[2]


def machine_codename() -> str:
    """Return the machine's Debian release, such as `bookworm`."""
    match = re.search(r'^VERSION_CODENAME="?(\w+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    if match is None:
        sys.exit("/etc/os-release names no VERSION_CODENAME: is this a Debian machine?")
    return match[1]


class Apt:
    """apt with a state of its own and one suite of the machine's mirror as its only source."""

    def __init__(self, suite: str, state: Path) -> None:
        codename = machine_codename()
        mirror = next((uri for uri, configured in configured_mirrors() if configured == codename), None)
        if mirror is None:
            sys.exit(f"no apt source for {codename} on this machine, so no mirror to take {suite} from")
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
        settings = {
            "Dir::State": state,
            "Dir::State::status": state / "status",
            "Dir::Cache": state / "cache",
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
        }
        self._options = [f"-o{name}={value}" for name, value in settings.items()]
        self._lists = state / "lists"

    def run(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        """Run `apt-get` or `apt-cache`; returns what it printed."""
        command = [tool, *self._options, "-qq", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=cwd, check=False)
        if done.returncode:
            sys.exit(f"{tool} {' '.join(arguments)} failed with status {done.returncode}; see above")
        return done.stdout

    def update(self) -> None:
        """Fetch the package lists of the suite."""
        self.run("apt-get", "update")

    def packages_of(self, name: str, depends_pattern: str) -> list[str]:
        """Return the package and, through dependencies whose names match the pattern, those that it stands for."""
        found: list[str] = []
        wanted = [name]
        while wanted:
            package = wanted.pop()
            found.append(package)
            depends = re.findall(
                rf"^ *Depends: ({depends_pattern})$", self.run("apt-cache", "depends", package), re.MULTILINE
            )
            wanted += [name for name in depends if name not in found and name not in wanted]
        return found

    def unpack(self, packages: list[str], folder: Path) -> None:
        """Download packages and unpack them into a folder, all into the same tree."""
        with tempfile.TemporaryDirectory(prefix="downloading-", dir=folder) as downloads:
            self.run("apt-get", "download", *packages, cwd=Path(downloads))
            for file in sorted(Path(downloads).glob("*.deb")):
                subprocess.run(["dpkg", "-x", file, folder], check=True)
