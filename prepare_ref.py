"""Reference statistics for FID of a data set under the training's crop: `prepare_ref.py --data_path DIR --img_size 256 --out fid_stats/x.npz`.

The file holds `mu` and `sigma` as the published ones do, and what they are of. All GPUs share the work under torchrun.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import evaluation
from datasets.imagenet import ClassFolder
from datasets.stream import PictureDataset
from datasets.text_image import TextImageFolder
from flags import Parser
from flags import get_parser as get_flags
from main_jit import or_leave, workers
from util import distributed as dist
from util import extractors
from util.errors import UserError
from util.files import writable_folder
from util.logging import say

SHARED = ("data_path", "img_size", "missing_captions", "inception_weights", "num_workers", "device")


def open_data(args: argparse.Namespace) -> PictureDataset:
    """Class folders where there is train/, else captioned pictures."""
    if (Path(args.data_path) / "train").is_dir():
        return ClassFolder(args.data_path, None, args.img_size)
    return TextImageFolder(args.data_path, args.img_size, missing=args.missing_captions)


def build(args: argparse.Namespace) -> None:
    for flag, least in (("img_size", 1), ("num_workers", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least {least}")
    out = Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: wanted a file name that ends in .npz")
    writable_folder(out.parent, "--out")
    device = dist.init(args.device)
    inception = extractors.load_fidelity(extractors.INCEPTION, args.inception_weights, device)
    if inception is None:
        raise UserError(f"no Inception weights; {extractors.missing(extractors.INCEPTION)}")
    dataset = open_data(args)
    evaluation.make_reference(dataset, args.data_path, inception, out, workers(args))
    say(f"{out}: statistics of {len(dataset)} pictures of {args.img_size} pixels; give it to --fid_stats")


def get_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for action in get_flags()._actions:
        if action.dest in SHARED:
            parser._add_action(action)
    parser.add_argument("--out", required=True, help="the file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    or_leave(build, get_parser().parse_args(argv))


if __name__ == "__main__":
    main()
