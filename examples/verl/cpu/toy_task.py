"""A task that a random model can be rewarded for: write words with an even number. Prompts are 3 to 9 random words."""

from __future__ import annotations

import random
from pathlib import Path

PROMPTS = 16


def write_prompts(file: Path) -> None:
    """Write verl's parquet columns: data_source, prompt (a chat), ability, reward_model, extra_info."""
    import pandas as pd

    rng = random.Random(0)
    rows = []
    for index in range(PROMPTS):
        words = " ".join(f"w{rng.randint(4, 127)}" for _ in range(rng.randint(3, 9)))
        rows.append(
            {
                "data_source": "toy",
                "prompt": [{"role": "user", "content": words}],
                "ability": "toy",
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": index},
            }
        )
    pd.DataFrame(rows).to_parquet(file)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **_) -> float:
    """Share of the answer's words that carry an even number (verl calls this by its ``custom_reward_function``)."""
    words = solution_str.split()
    even = sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in words)
    return even / max(len(words), 1)
