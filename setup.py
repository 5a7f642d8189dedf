"""README.md as the package page's text, where a link to a file of the repository needs its address."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
source = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Source"]
text = (root / "README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"\]\((?!https?://|#)", f"]({source}/blob/main/", text),
    long_description_content_type="text/markdown",
)
