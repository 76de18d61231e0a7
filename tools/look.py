"""Pictures of the page that `foveate report` writes, as Chromium shows it at desktop and phone width, light and dark.

python tools/look.py             # a small measurement of `mini` (a minute)
python tools/look.py RUN         # a file of foveate eval --json, or the folder of a run
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from foveate.cli import main as foveate
from foveate.runs import make_folder

OUT = Path(__file__).parents[1] / "look"
RIVALS = ("fopru:keep=64", "fopru:keep=16", "uniform:keep=64", "pyramiddrop:keep=144/64/16", "divprune:keep=64")
VIEWS = {"desktop": (1280, 7000, 1), "phone": (390, 14000, 1), "desktop-dark": (1280, 7000, 0)}
"""Width and height in pixels, and the colour scheme as Chromium numbers it."""


def measured(out: Path) -> Path:
    """A small measurement of mini."""
    file = out / "rows.json"
    rivals = [word for spec in RIVALS for word in ("--prune", spec)]
    task = ["eval", "--model", "mini", "--tasks", "scenes", "--samples", "50", "--pictures", "2"]
    code = foveate([*task, *rivals, "--json", str(file)])
    return file if code == 0 else sys.exit(code)


def main() -> int:
    """Measure where nothing was given, write the page, and let the browser draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    given = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("there is no Chromium here; on Debian: apt-get install chromium", file=sys.stderr)
        return 1
    out = make_folder(OUT)
    page = out / "report.html"
    if code := foveate(["report", str(given.run or measured(out)), "--out", str(page)]):
        return code
    for name, (width, height, scheme) in VIEWS.items():
        target = out / f"{name}.png"
        options = [f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}"]
        headless = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command = [browser, *headless, *options, f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
