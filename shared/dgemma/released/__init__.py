"""The published config.json and generation_config.json of google/diffusiongemma-26B-A4B-it.

Plans, benchmarks and tests use its geometry without a download.
"""

from pathlib import Path

RELEASED_DIR = Path(__file__).parent
