import re
from pathlib import Path

import robustkern

API = Path(__file__).resolve().parent.parent / "docs" / "api.md"


def test_every_public_name_is_on_the_api_page():
    shown = re.findall(r"^\.\. auto\w+:: (?:robustkern\.)?(\w+)$", API.read_text(), re.MULTILINE)
    assert set(robustkern.__all__) <= set(shown)
