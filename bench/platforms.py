#!/usr/bin/env python3
"""Can requirements.txt be installed on other machines? Asks uv's resolver; nothing is downloaded or installed.

    make platforms    # or: python bench/platforms.py

For each system and Python version it resolves requirements.txt with wheels only, and prints the number of packages or
the package that has no wheel. Exits with 1 if one is missing. A package registry that lacks files answers for itself
only. Resolving does not show that the scripts run there.
"""

import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".venv-clients" / "packages" / "uv"  # removed by `make clean`
SYSTEMS = {
    "Linux x86_64": "x86_64-unknown-linux-gnu",
    "Linux aarch64": "aarch64-unknown-linux-gnu",
    "Windows amd64": "x86_64-pc-windows-msvc",
    "macOS 14 arm64": "aarch64-apple-darwin",
}
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
MACOS = "14.0"  # the oldest that torch's wheels support; uv's default is 13


def main():
    if not UV.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(UV)]
        subprocess.run([*pip, "uv==0.13.9"], check=True)
    found = {}
    with tqdm(total=len(SYSTEMS) * len(VERSIONS), unit="machine") as bar:
        for system in SYSTEMS:
            for version in VERSIONS:
                bar.set_description(f"{system}, Python {version}")
                found[system, version] = resolved(system, version)
                bar.update()
    print(f"\n| system | {' | '.join(f'Python {v}' for v in VERSIONS)} |\n{'|---' * (len(VERSIONS) + 1)}|")
    for system in SYSTEMS:
        cells = (found[system, version] for version in VERSIONS)
        print(f"| {system} | {' | '.join(f'{cell} packages' if cell.isdigit() else cell for cell in cells)} |")
    sys.exit(not all(cell.isdigit() for cell in found.values()))


def resolved(system, version):
    """The number of packages that requirements.txt needs there, or why it cannot be installed."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "requirements.txt", "--quiet", "--no-annotate"]
    command += ["--no-header", "--only-binary", ":all:", "--python-platform", SYSTEMS[system]]
    environment = dict(os.environ, PYTHONPATH=str(UV), MACOSX_DEPLOYMENT_TARGET=MACOS)
    done = subprocess.run(
        [*command, "--python-version", version], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        return " ".join(done.stderr.split())[:200].replace("|", "/") or f"uv ended with {done.returncode}"
    return str(sum("==" in line for line in done.stdout.splitlines()))


if __name__ == "__main__":
    main()
