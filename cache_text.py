"""Encode a data set's captions ahead of time: a training command with cache_text.py in place of main_jit.py, or just its data and text flags.

The store that training builds by itself, and then finds complete: `torchrun ... cache_text.py --data_path DIR --llm_model_name NAME`.
May be killed and started again, and run by several jobs at once: each takes what the others have not done.
"""

from collections.abc import Sequence
from pathlib import Path

import flags
from util.errors import told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse_cache()  # before torch is imported

import text_features
from config import CacheJob
from datasets.source import open_data
from engine_jit import test_prompts
from evaluation.plan import read_eval_captions
from util import distributed as dist
from util.files import read_lines


def build(job: CacheJob) -> None:
    """Raises: UserError where it cannot be built."""
    asked = read_lines(job.prompts_file, "--prompts_file") if job.prompts_file else job.prompts
    drawn = read_eval_captions(Path(job.eval_captions)) if job.eval_captions else []
    device = dist.init(job.run.device)
    dataset = open_data(job.data, job.model, job.run.seed)
    folder = text_features.store_folder(job.text, job.data.path, job.run.output_dir)
    text_features.build_store(job.text.encoder, folder, dataset.captions, [*(asked or test_prompts), *drawn], device)


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line(), dist.lost_ranks():
        build(flags.parse_cache(argv))
    dist.shutdown()


if __name__ == "__main__":
    main()
