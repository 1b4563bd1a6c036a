"""What benchmarks/results holds: what the tests of documents, plots and versions compare with."""

import json

from processes import ROOT

RESULTS = ROOT / "benchmarks" / "results"
# of every file that says how it was made: card, driver, versions, commit
ENVIRONMENTS = [
    data["environment"] for file in RESULTS.glob("*.json") if "environment" in (data := json.loads(file.read_text()))
]
