"""The benchmark: cases as data, peers where they are installed, correctness before every time."""
