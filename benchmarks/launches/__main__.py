"""`python -m benchmarks.launches`."""

from benchmarks.launches import main

main()
