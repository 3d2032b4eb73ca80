"""The project's own files, for tests of its shape."""

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def project_files() -> tuple[Path, ...]:
    """The project's files relative to its root: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = {Path(name) for name in listed.stdout.decode().split("\0") if name}
    else:  # not a clone: an unpacked archive holds what was tracked
        names = {path.relative_to(ROOT) for path in ROOT.rglob("*")}
        made = {"build", "dist", "runs", "__pycache__"}
        names = {n for n in names if not any(p in made or p.startswith(".") for p in n.parts)}
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))
