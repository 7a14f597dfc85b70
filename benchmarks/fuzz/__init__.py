"""Mutated checkpoints: `python -m benchmarks.fuzz --cases 10000`.

Each case changes one file, or several, of a copy of the embedded checkpoint and does with it what a user
does: it is verified, loaded, asked a question and run for a step. Only two outcomes are good: an answer, or a
refusal in one line. What a load refuses must not be sound to `dgemma verify`. A case follows from the seed
and its number, and `--only` repeats it.

A worker runs the cases with limits of memory and time; when it dies or hangs, its case is the culprit, and
another goes on behind it.
"""
