"""Check a wheel's contents, install it into a separate virtual environment, and run it there.

    python .ci/check_wheel.py build/wheel/attn_dispatch-*.whl

The environment has only the wheel; its dependencies are those of the Python that runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Folder of the repository -> folder of the wheel.
FOLDERS = {"dispatch": "attn_dispatch", "backends": "attn_dispatch/backends"}

_IMPORTS = """
import importlib.util, pathlib, sys
import attn_dispatch, attn_dispatch.backends.reference.torch_ref
home = pathlib.Path(attn_dispatch.__file__)
assert pathlib.Path(sys.prefix) in home.parents, f"imported from {home}, not from the wheel"
for name in ("dispatch", "backends"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed under its bare name"
"""


def check_contents(wheel: Path) -> None:
    """Exit with a message unless the wheel holds every file of the folders, and nothing bare."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{target}/{file.relative_to(ROOT / source).as_posix()}"
        for source, target in FOLDERS.items()
        for file in (ROOT / source).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    missing = sorted(expected - names)
    if missing:
        sys.exit(
            f"{wheel.name} lacks {', '.join(missing)}. List the folder under packages, or the "
            "file under package-data, in pyproject.toml."
        )
    tops = {name.split("/")[0] for name in names}
    bare = sorted(top for top in tops if top != "attn_dispatch" and not top.endswith(".dist-info"))
    if bare:
        sys.exit(f"{wheel.name} installs {', '.join(bare)} at the top level.")
    print(f"{wheel.name}: {len(names)} files, all there")


def check_install(wheel: Path) -> None:
    """Install the wheel and run the commands that a user runs first."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        run("-m", "venv", "--without-pip", str(home / "venv"))
        python = home / "venv" / "bin" / "python"
        options = ("--no-deps", "--no-index", "--disable-pip-version-check", "-q")
        run("-m", "pip", "--python", str(python), "install", *options, str(wheel))
        # Python does not search a path in a .pth file for more .pth files, so the editable install
        # there has no effect.
        paths = sysconfig.get_paths(vars={"base": str(home / "venv")})
        pth = Path(paths["purelib"]) / "dependencies.pth"
        pth.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        program = str(python.with_name("attn-dispatch"))
        for command in (
            [str(python), "-c", _IMPORTS],
            [program, "doctor"],
            [program, "verify", "TORCH_SDPA", "--quick", "--only", "numbers"],
        ):
            shown = " ".join(["attn-dispatch", *command[1:]]) if command[0] == program else "import"
            print(f"from the wheel: {shown}", flush=True)
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            done = subprocess.run(
                command, cwd=home, env=environment, check=False, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")


def run(*arguments: str) -> None:
    """Run this Python with arguments."""
    subprocess.run([sys.executable, *arguments], check=True)


def main() -> None:
    """Check the wheel that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(f"Name one wheel, not {len(sys.argv) - 1}.")
    wheel = Path(sys.argv[1]).resolve()
    check_contents(wheel)
    check_install(wheel)


if __name__ == "__main__":
    main()
