"""What pyproject.toml cannot say: the README's links, made absolute for a package index, and the repository's address.

Both from GITHUB_SERVER_URL and GITHUB_REPOSITORY, which GitHub's workflows set; elsewhere links stay as they are.
"""

import os
import re
from pathlib import Path

from setuptools import setup

server, repository = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
readme, urls = Path("README.md").read_text(encoding="utf-8"), {}
if server and repository:
    home = f"{server}/{repository}"
    revision = os.environ.get("GITHUB_REF_NAME", "HEAD")
    readme = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{home}/raw/{revision}/", readme)  # pictures
    readme = re.sub(r"(?<!!)(\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{home}/blob/{revision}/", readme)
    urls = {
        "Repository": home,
        "Documentation": f"{home}/blob/{revision}/CLEAN_USAGE_GUIDE.md",
        "Changelog": f"{home}/blob/{revision}/CHANGELOG.md",
        "Issues": f"{home}/issues",
    }
setup(long_description=readme, long_description_content_type="text/markdown", project_urls=urls)
