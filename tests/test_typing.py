"""The annotations are true for users who type-check: mypy reads a program of theirs, and the README's."""

import subprocess
import sys

import pytest
from test_readme import BLOCK, ROOT

pytestmark = pytest.mark.cpu_only("annotations")
OPTIONS = [
    "--strict",
    "--follow-imports=silent",  # nothing is said of the package itself, which has rules of its own
    "--allow-redefinition",  # the README is a page, on which each section has its own lm
    "--untyped-calls-exclude=torch",  # Tensor.backward
    "--cache-dir=.mypy_cache/users",
]


def test_programs_of_users_type_check(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    if not (ROOT / "README.md").exists():
        pytest.skip("needs the source tree")
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    readme = tmp_path / "readme.py"
    readme.write_text("\n".join(code for kind, code in blocks if kind == "python"), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", *OPTIONS, "tests/typed_program.py", str(readme)]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
