"""Prefill and milliseconds a denoising step: both backends beside transformers and mlx-vlm, in one run.

    python -m benchmarks.peers                                 # every engine that is installed
    python -m benchmarks.peers -e dgemma-cuda -e transformers --context 2048 --set num_experts=64
    python -m benchmarks.peers -e dgemma-mlx -e mlx-vlm --format plain --format 4bit \
        --dtype float32 --dtype bfloat16 --context 512 --context 4096

The peers come with `pip install -e '.[mlx,cuda,bench]'`. How the numbers are made:

- All engines read one random checkpoint, in float32 or bfloat16 on disk as in memory. It is about 105
  million parameters unless `--set` changes the geometry, or any checkpoint given with `--checkpoint`.
  `--format 4bit` is that checkpoint after `dgemma convert --to mlx`, mlx-community's pattern, for the two
  MLX engines; `--dtype` is then that of activations. Options given twice are all combined.
- Logits are compared between the engines before anything is timed, of a first step and of one with given
  self-conditioning, in processes of their own: nobody is timed on another model. A difference ends the run.
  The comparison is in float32 whatever is timed: a random model amplifies bfloat16's rounding to a quarter
  of the logits' spread. Some router's picks tie within float32's rounding. So a tenth of the positions may
  differ, and prompts are cut to 64 tokens, as a pick that differs there reaches every position.
  `--no-compare` is for a checkpoint that does not fit in float32.
- Each engine lives in a process of its own, so that memory, BLAS and thread pools are its own too.
  Rounds go through the engines in turn (A B A B), so that what else the machine does falls on all alike.
- The clock times each engine's own generate loop over one canvas, not a rebuilt step: forward pass,
  temperature, softmax, entropy, sample, acceptance and new noise are its own. It is read where the
  loop shows a draft. The first step has no self-conditioning and is left out; so is the first round.
  The confidence threshold is set so low that no loop stops early.
- Both peers show a draft before they make the soft embedding and ours after, so an interval between two
  drafts holds exactly one of everything in every engine.
- mlx-vlm runs its entropy-bound sampler at temperature 1 on top of the schedule: the released sampler,
  though not its default. transformers runs its defaults (SDPA, grouped_mm experts, no compilation).
- mlx-vlm needs a GPU for bfloat16: the product of MLX's CPU that its experts use is float32 only. An engine
  that fails in its first round is shown with its error and left out.
- Peak memory is the process's, so it holds the interpreter and what an engine imports; mlx-vlm imports
  PyTorch. A GPU's is the device's. MLX engines also show the most that MLX had in use above the weights,
  in MB, before the first draft and from there on: the prefill, and the steps with the cache they read. The
  ratio of the larger of the two is the call's.

MLX's Linux wheel carries an unoptimized BLAS (2.6 GFLOP/s on two cores). An OpenBLAS is preloaded for
both MLX engines when one is found, and the table says so when none is.

The files: `checkpoint` makes what `engines` read, `serve` is the process of one and `worker` starts it,
`rounds` compares and times them, and `report` tells it.
"""
