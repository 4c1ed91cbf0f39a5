"""Encode a data set's captions ahead of time: a training command with cache_text.py in place of main_jit.py, or just its data and text flags.

The store that training builds by itself, and then finds complete: `torchrun ... cache_text.py --data_path DIR --llm_model_name NAME`.
May be killed and started again, and run by several jobs at once: each takes what the others have not done.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import text_features
from flags import Parser, check_args
from flags import get_parser as get_flags
from main_jit import make_dataset, or_leave, read_prompts, store_folder, text_config
from util import distributed as dist
from util.errors import UserError


def build(args: argparse.Namespace) -> None:
    check_args(args)
    if args.text_cache != "disk":
        raise UserError(f"--text_cache {args.text_cache} keeps no store that could be made ahead of time; leave it out")
    prompts = read_prompts(args)
    device = dist.init(args.device)
    config = replace(text_config(args), pooling=args.text_pooling)
    text_features.build_store(config, store_folder(args), make_dataset(args).captions, prompts, device)


def get_parser() -> Parser:
    parser = get_flags()
    parser.description = __doc__.split("\n")[0]
    parser.set_defaults(model="JiT-B/16-Text")
    parser.add_argument(
        "--text_pooling", choices=("mean", "tokens"), default="mean", help="one vector a caption, which training reads, or the states of all its tokens"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    or_leave(build, get_parser().parse_args(argv))


if __name__ == "__main__":
    main()
