import ast
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_the_page_is_that_of_the_results():
    check = [sys.executable, "bench/compatibility.py", "--check"]
    assert subprocess.run(check, cwd=TESTS.parent, check=False).returncode == 0


def test_every_marked_setting_has_its_row_and_every_row_its_test():
    calls = [
        node
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.setting"
    ]
    marked = {ast.literal_eval(call.args[0]) for call in calls}
    page = (TESTS.parent / "docs" / "compatibility.md").read_text()
    names = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    rows = [name for name in names if name not in ("setting", "---")]
    assert marked == set(rows)
    assert len(rows) == len(set(rows))
