"""A task that a random model can be rewarded for: write words with an even number. Prompts are random words."""

from __future__ import annotations

import random
from pathlib import Path

FIRST_WORD = 9  # below it are the tokenizer's special tokens


def write_prompts(file: Path, prompts: int = 16, words: tuple[int, int] = (3, 9), vocabulary: int = 128) -> None:
    """Write verl's parquet columns: data_source, prompt (a chat), ability, reward_model, extra_info.

    ``words``: of the shortest and the longest prompt.
    """
    import pandas as pd

    rng = random.Random(0)
    rows = []
    for index in range(prompts):
        text = " ".join(f"w{rng.randrange(FIRST_WORD, vocabulary)}" for _ in range(rng.randint(*words)))
        rows.append(
            {
                "data_source": "toy",
                "prompt": [{"role": "user", "content": text}],
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
