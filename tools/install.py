"""Install packages by uv, from where pip is told to take them, which uv does not read.

python tools/install.py UV PYTHON ARGUMENT... runs `UV pip install --python PYTHON ARGUMENT...`; the Python that runs
this has pip.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable

SEVERAL = ("find-links", "extra-index-url", "constraint")
"""Settings of pip that name one or more places, and are options of uv under the same name."""
ONE = ("index-url",)


def settings(lines: Iterable[str]) -> dict[str, list[str]]:
    """What `pip config list` prints: values by name, of whichever command and level; the environment's come first."""
    found: dict[str, list[str]] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        name = key.rpartition(".")[2].replace("_", "-")
        if equals:
            old = found.setdefault(name, [])
            new = [one for one in ast.literal_eval(value).split() if one not in old]
            found[name] = [*new, *old] if key.startswith(":env:") else [*old, *new]
    return found


def options(found: dict[str, list[str]]) -> list[str]:
    """The options of uv that say the same."""
    given = [(f"--{name}", value) for name in SEVERAL for value in found.get(name, [])]
    given += [(f"--{name}", found[name][0]) for name in ONE if name in found]
    if "extra-index-url" in found:
        given.append(("--index-strategy", "unsafe-best-match"))  # of all indexes, as pip chooses
    return [word for pair in given for word in pair]


def main() -> int:
    """Run uv; where it fails or is not there, pip, which takes longer."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found = settings(listed.splitlines())
    environment = dict(os.environ)
    if "cert" in found:
        environment.setdefault("SSL_CERT_FILE", found["cert"][0])
    uv, target, *arguments = sys.argv[1:]
    if os.access(uv, os.X_OK):
        made = [uv, "pip", "install", "--quiet", "--python", target, *options(found), *arguments]
        if subprocess.run(made, check=False, env=environment).returncode == 0:
            return 0
    print("uv did not install; pip does, which takes longer", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--python", target, "install", "-qq", "--disable-pip-version-check"]
    return subprocess.run([*pip, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
