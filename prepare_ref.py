"""Reference statistics for FID of a data set under the training's crop: `prepare_ref.py --data_path DIR --img_size 256 --out fid_stats/x.npz`.

The file holds `mu` and `sigma` as the published ones do, and what they are of. All GPUs share the work under torchrun.
"""

from collections.abc import Sequence
from pathlib import Path

import flags
from util.errors import UserError, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse_reference()  # before torch is imported

from config import ReferenceJob
from datasets.source import open_pictures, workers
from evaluation.references import make_reference
from util import distributed as dist
from util import extractors
from util.files import writable_folder
from util.logging import say


def build(job: ReferenceJob) -> None:
    """Raises: UserError where they cannot be made."""
    out = Path(job.out)
    writable_folder(out.parent, "--out")
    device = dist.init(job.device)
    inception = extractors.load_fidelity(extractors.INCEPTION, job.inception_weights, device)
    if inception is None:
        raise UserError(f"no Inception weights; {extractors.missing(extractors.INCEPTION)}")
    dataset = open_pictures(job.data, job.img_size)
    make_reference(dataset, job.data.path, inception, out, workers(job.data))
    say(f"{out}: statistics of {len(dataset)} pictures of {job.img_size} pixels; give it to --fid_stats")


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line(), dist.lost_ranks():
        build(flags.parse_reference(argv))
    dist.shutdown()


if __name__ == "__main__":
    main()
