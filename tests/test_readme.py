import re
import subprocess
import sys
from pathlib import Path

import robustkern
from robustkern import functional

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_results():
    check = [sys.executable, "bench/readme.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0


def test_every_op_and_penalty_is_named():
    for name in set(functional.__all__) - {"show_config"}:
        assert f"`{name}(" in README
    for name in ("CURE", "SGR", "GradientPenalty", "LipschitzPenalty", "Sum", "Lazy"):
        assert f"`{name}(" in README
        assert hasattr(robustkern, name)


def test_every_command_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
