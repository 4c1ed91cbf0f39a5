"""The command line: flags, what they mean, and whether their values can work.

Read by main_jit.py alone, and by the two programs that take some of its flags; nothing below them knows of flags.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

from models_jit import parse_model_name
from text_encoder import DTYPES, LAYERS
from util.errors import UserError, leave
from util.metrics import NEIGHBOURHOOD

TEXT_FLAGS = ("llm_model_name", "max_text_len", "llm_layer", "llm_dtype", "text_norm", "text_cache", "text_cache_dir", "held_out", "missing_captions")
TEXT_FLAGS += ("eval_captions", "clip_model", "trust_remote_code")


# No effect on a run that evaluates nothing.
EVALUATION_FLAGS = (
    "save_images", "fid_stats", "inception_weights", "eval_captions", "clip_model", "precision_recall", "vgg16_weights", "fd_dinov2",
)  # fmt: skip


def numbers(text: str) -> tuple[float, ...]:
    """'2.9', '1,2.5' or '1.0:4.0:0.1', whose end belongs to it."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            if values := tuple(round(first + i * step, 10) for i in range(math.floor((last - first) / step + 1e-6) + 1)):
                return values
            raise ValueError("nothing in this range")
        return tuple(map(float, text.split(",")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text}: wanted a number, a list like 1,2.5, or a range like 1.0:4.0:0.1") from None


def intervals(text: str) -> tuple[tuple[float, float], ...]:
    """'0-1,0.1-1'."""
    try:
        pairs = [part.split("-") for part in text.split(",")]
        return tuple((float(low), float(high)) for low, high in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: wanted ranges of t like 0-1,0.1-1") from None


def weight_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= {"1", "2", "raw"}:
        raise argparse.ArgumentTypeError(f"{text}: wanted 1, 2, raw, or several like 1,2,raw")
    return names


class Parser(argparse.ArgumentParser):
    """Says which flag was probably meant."""

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown flag {unknown[0]}{f'; did you mean {near[0]}?' if near else ''}")
        return args

    def error(self, message: str) -> NoReturn:
        leave(f"error: {message}", 2)


def get_parser() -> Parser:
    parser = Parser(
        description="Train, sample and evaluate JiT on captions or class labels.", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="JiT-B/16", help="JiT-SIZE/PATCH or JiT-SIZE/PATCH-Text; sizes Nano Ti S B L H G")
    group.add_argument("--img_size", type=int, default=256, help="width and height of the pictures, a multiple of the patch size")
    group.add_argument("--attn_dropout", type=float, default=0.0, help="dropout of the attention weights, in the middle half of the blocks")
    group.add_argument(
        "--proj_dropout", type=float, default=0.0, help="dropout after attention and in the MLP, in the middle half of the blocks (paper: 0.2 for H)"
    )
    group.add_argument("--class_num", type=int, default=1000, help="classes of a class model")

    group = parser.add_argument_group("text")
    group.add_argument("--use_text_conditioning", action="store_true", help="condition on captions; implied by a -Text model, an error with another")
    group.add_argument("--llm_model_name", default="llm-jp/llm-jp-3-3.7b", help="frozen language model: a Hugging Face hub name or a folder")
    group.add_argument("--freeze_llm", action=argparse.BooleanOptionalAction, default=True, help="the LLM is always frozen; --no-freeze_llm is refused")
    group.add_argument("--trust_remote_code", action="store_true", help="run the Python code that the LLM brings along; only for authors you trust")
    group.add_argument("--max_text_len", type=int, default=77, help="tokens of a caption that are read; the rest is cut off")
    group.add_argument(
        "--llm_layer",
        choices=LAYERS,
        default="mean",
        help="states that become features: the last or next to last layer's, the middle one's, or the mean over all of RMS-normalised states",
    )
    group.add_argument(
        "--llm_dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="type the LLM runs in; auto: that of the checkpoint, else of the text store, else bf16 on a GPU and fp32 on a CPU",
    )
    group.add_argument(
        "--text_norm",
        choices=("none", "standardize"),
        default="standardize",
        help="standardize: text features to mean 0, variance 1 per dimension over the training captions",
    )
    group.add_argument(
        "--text_cache",
        choices=("disk", "memory", "off"),
        default="disk",
        help="features of each distinct caption once, in a store on disk or in memory; off: the LLM runs in every step, for captions too varied to store",
    )
    group.add_argument(
        "--text_cache_dir", default=None, help="folder of the store (default: text_cache in data_path, or in output_dir where that is read-only)"
    )
    group.add_argument(
        "--held_out",
        type=int,
        default=64,
        help="pictures kept out of training to measure text_gap on, a hundredth of all at most; where none are, it is measured on training pictures",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="./data", help="folder with images/ and captions/ (text) or train/<class>/ (classes)")
    group.add_argument("--missing_captions", choices=("error", "skip"), default="error", help="pictures without captions and captions without a picture")
    group.add_argument(
        "--bad_images",
        choices=("error", "skip"),
        default="skip",
        help="unreadable pictures; skipped ones are listed in output_dir/bad_images.txt, over 1 %% is an error",
    )
    group.add_argument(
        "--hflip",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="random horizontal flip (default: on for classes, off for text, where left, right and letters would be wrong)",
    )
    group.add_argument("--num_workers", type=int, default=12, help="loader processes per training process, at most one a core")
    group.add_argument("--pin_mem", action="store_true", default=True, help="page-locked memory for faster copies to the GPU")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="ordinary memory instead")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=200, help="passes over the data, the resumed ones included")
    group.add_argument("--warmup_epochs", type=float, default=5, help="epochs of linear warm-up of the learning rate from 0")
    group.add_argument("--batch_size", type=int, default=128, help="pictures per process and step part; effective batch = batch_size x accum_iter x processes")
    group.add_argument("--accum_iter", type=int, default=1, help="parts whose gradients are added up before each optimizer step")
    group.add_argument("--lr", type=float, default=None, help="absolute learning rate (default: blr x effective batch / 256)")
    group.add_argument("--blr", type=float, default=5e-5, help="base learning rate, per 256 pictures")
    group.add_argument("--min_lr", type=float, default=0.0, help="where --lr_schedule cosine ends")
    group.add_argument("--lr_schedule", choices=("constant", "cosine"), default="constant", help="after the warm-up")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's, not on biases and norms")
    group.add_argument("--grad_clip", type=float, default=None, help="largest gradient norm (default: no clipping)")
    group.add_argument("--ema_decay1", type=float, default=0.9999, help="first weight average, the one that is sampled")
    group.add_argument("--ema_decay2", type=float, default=0.9996, help="second weight average")
    group.add_argument(
        "--no_ema_warmup", action="store_false", dest="ema_warmup", help="use the decays from the first step on instead of min(decay, (1 + n) / (10 + n))"
    )
    group.add_argument("--label_drop_prob", type=float, default=0.1, help="share of captions or labels replaced by the null, for guidance")
    group.add_argument("--P_mean", type=float, default=-0.8, help="t = sigmoid(P_mean + P_std x normal)")
    group.add_argument("--P_std", type=float, default=0.8, help="see --P_mean")
    group.add_argument("--noise_scale", type=float, default=1.0, help="standard deviation of the noise: img_size / 256 in the paper")
    group.add_argument("--t_eps", type=float, default=0.05, help="1 - t is never taken below this where it divides")
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="autocast of the network; weights are float32 always; auto: bf16 on a GPU, fp32 on a CPU",
    )
    group.add_argument("--seed", type=int, default=0, help="what every random number of the run follows from")
    group.add_argument("--start_epoch", type=int, default=None, help="number of the first epoch (default: what the checkpoint says, else 0)")

    group = parser.add_argument_group("sampling and evaluation")
    group.add_argument("--sampling_method", choices=("heun", "euler"), default="heun", help="solver; the last step is Euler's either way")
    group.add_argument("--num_sampling_steps", type=int, default=50, help="steps of the solver from noise to picture")
    group.add_argument("--cfg", type=numbers, default="1.0", help="scale of classifier-free guidance; 1 is none; for --sweep several: 1.5,2,3 or 1.0:4.0:0.1")
    group.add_argument("--interval_min", type=float, default=0.0, help="guidance acts where interval_min < t < interval_max")
    group.add_argument("--interval_max", type=float, default=1.0, help="see --interval_min")
    group.add_argument("--num_images", type=int, default=50000, help="pictures of an evaluation")
    group.add_argument("--gen_bsz", type=int, default=256, help="pictures drawn at a time per process")
    group.add_argument("--eval_ema", type=weight_names, default="1", help="weights that draw: the averages 1 and 2, or raw; for --sweep several: 1,2,raw")
    group.add_argument("--eval_freq", type=int, default=40, help="epochs between evaluations")
    group.add_argument("--online_eval", action="store_true", help="evaluate while training, every eval_freq epochs and at the end")
    group.add_argument("--evaluate_gen", action="store_true", help="evaluate the checkpoint of --resume and stop")
    group.add_argument(
        "--sweep", action="store_true", help="evaluate the checkpoint of --resume under all combinations of --eval_ema, --cfg and --interval, then the best"
    )
    group.add_argument("--sweep_images", type=int, default=8000, help="pictures of each combination of --sweep; the best is evaluated with --num_images")
    group.add_argument(
        "--interval", type=intervals, default=None, help="ranges of t for --sweep, such as 0-1,0.1-1, in place of --interval_min and --interval_max"
    )
    group.add_argument("--save_images", action="store_true", help="keep an evaluation's pictures as PNG, below output_dir/eval/")
    group.add_argument("--fid_stats", default=None, help="reference statistics (.npz with mu and sigma) in place of the data's own; see prepare_ref.py")
    group.add_argument(
        "--inception_weights",
        default=None,
        help="file of torch-fidelity's Inception weights (default: torch's cache, else a download into it); none: no FID and IS",
    )
    group.add_argument(
        "--eval_captions", default=None, help="captions to draw in evaluations: a UTF-8 file, one a line, or a folder of .txt (default: the data's)"
    )
    group.add_argument(
        "--clip_model", default=None, help="CLIP for CLIP score and R-precision, a hub name or a folder, such as llm-jp/waon-siglip2-base-patch16-256"
    )
    group.add_argument("--precision_recall", action="store_true", help="precision and recall too, with VGG16")
    group.add_argument("--vgg16_weights", default=None, help="file of torchvision's VGG16 weights, for --precision_recall (default as for --inception_weights)")
    group.add_argument("--fd_dinov2", default=None, metavar="MODEL", help="FD-DINOv2 too, with that model: facebook/dinov2-large, or a folder")
    group.add_argument("--generate", action="store_true", help="draw prompts with the checkpoint of --resume into output_dir/samples/ and stop")
    group.add_argument(
        "--prompt",
        action="append",
        default=None,
        help="a prompt for --generate, may be given several times (default: engine_jit.test_prompts; a class model takes label numbers)",
    )
    group.add_argument("--prompts_file", default=None, help="UTF-8 file with a prompt a line, for --generate")

    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output_dir", help="checkpoints, TensorBoard events, pictures")
    group.add_argument("--resume", default=None, help="checkpoint file, or folder with checkpoint-last.pth; may be output_dir itself while that is new")
    group.add_argument("--save_last_freq", type=int, default=5, help="epochs between writings of checkpoint-last.pth")
    group.add_argument("--save_freq_steps", type=int, default=None, help="and steps between them, within epochs too (default: at ends of epochs only)")
    group.add_argument("--keep_last", type=int, default=None, help="how many of the numbered checkpoints, of every 100th epoch, to keep (default: all)")
    group.add_argument("--log_freq", type=int, default=100, help="steps between lines of the log")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU where there is one")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises: UserError for a value that cannot work, before anything is loaded."""

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    try:
        _, patch, args.is_text = parse_model_name(args.model)
    except ValueError as error:
        raise UserError(f"--model {error}") from error
    require(args.img_size > 0, f"--img_size {args.img_size} must be positive")
    smaller = args.img_size // patch * patch
    require(
        args.img_size % patch == 0, f"--img_size {args.img_size} is not a multiple of the patch size {patch} of --model {args.model}; try {smaller or patch}"
    )
    require(args.is_text or not args.use_text_conditioning, f"--use_text_conditioning needs a text model; try --model {args.model}-Text")
    require(args.freeze_llm, "--no-freeze_llm: the LLM is always frozen, since its features are computed once for the whole run; leave the flag out")
    defaults = get_parser().parse_args([])
    for flag in ("class_num",) if args.is_text else TEXT_FLAGS:
        require(getattr(args, flag) == getattr(defaults, flag), f"--{flag} has no effect on the {'text' if args.is_text else 'class'} model {args.model}")
    require(args.text_cache == "disk" or args.text_cache_dir is None, f"--text_cache_dir has no effect with --text_cache {args.text_cache}")
    require(args.lr is None or args.blr == defaults.blr, "--lr and --blr: give one of them")
    require(args.min_lr == 0 or args.lr_schedule == "cosine", "--min_lr is where --lr_schedule cosine ends; add that, or leave it out")

    for flag, value in vars(args).items():
        for number in value if flag == "cfg" else (value,):
            require(not isinstance(number, float) or math.isfinite(number), f"--{flag} {number} must be a finite number")

    for flag in (
        "epochs",
        "batch_size",
        "accum_iter",
        "max_text_len",
        "num_sampling_steps",
        "num_images",
        "sweep_images",
        "eval_freq",
        "gen_bsz",
        "class_num",
        "save_last_freq",
        "log_freq",
    ):
        require(getattr(args, flag) >= 1, f"--{flag} {getattr(args, flag)} must be at least 1")
    for flag in ("save_freq_steps", "keep_last"):
        require(getattr(args, flag) is None or getattr(args, flag) >= 1, f"--{flag} {getattr(args, flag)} must be at least 1")
    for flag in ("num_workers", "seed", "held_out", "warmup_epochs", "min_lr", "weight_decay"):
        require(getattr(args, flag) >= 0, f"--{flag} {getattr(args, flag)} must not be negative")
    for flag in ("blr", "P_std", "noise_scale", "lr", "grad_clip"):
        require(getattr(args, flag) is None or getattr(args, flag) > 0, f"--{flag} {getattr(args, flag)} must be positive")
    for flag in ("attn_dropout", "proj_dropout", "ema_decay1", "ema_decay2", "t_eps"):
        require(0 <= getattr(args, flag) < 1, f"--{flag} {getattr(args, flag)} must be in [0, 1)")
    require(args.t_eps > 0, "--t_eps 0 would divide by zero at t = 1; the paper uses 0.05")
    require(0 <= args.label_drop_prob <= 1, f"--label_drop_prob {args.label_drop_prob} must be in [0, 1]")
    require(min(args.cfg) >= 0, f"--cfg {min(args.cfg)} must not be negative")
    low, high = args.interval_min, args.interval_max
    require(0 <= low <= high <= 1, f"--interval_min {low} --interval_max {high}: wanted 0 <= interval_min <= interval_max <= 1")
    start = args.start_epoch or 0
    require(0 <= start < args.epochs, f"--start_epoch {start} must be in [0, epochs), and --epochs is {args.epochs}")

    modes = [f"--{mode}" for mode in ("generate", "evaluate_gen", "sweep", "online_eval") if getattr(args, mode)]
    require(len(modes) <= 1, f"{' and '.join(modes)} are different runs; give one of them")
    require(not modes or modes[0] == "--online_eval" or args.resume is not None, f"{modes and modes[0]} needs a trained model: --resume FOLDER_OR_FILE")
    check_evaluation(args, defaults, require)
    for flag in ("prompt", "prompts_file"):
        require(getattr(args, flag) is None or args.generate, f"--{flag} is for --generate")
    require(args.prompt is None or args.prompts_file is None, "--prompt and --prompts_file: give one of them")


def check_evaluation(args: argparse.Namespace, defaults: argparse.Namespace, require: Callable[[bool, str], None]) -> None:
    for flag in EVALUATION_FLAGS:
        require(evaluates(args) or not getattr(args, flag), f"--{flag} has no effect without --online_eval, --evaluate_gen or --sweep")
    few = min(evaluation_sizes(args), default=0)
    require(few > NEIGHBOURHOOD or not args.precision_recall, f"--precision_recall needs more than {NEIGHBOURHOOD} pictures, and {few} are asked for")
    require(args.vgg16_weights is None or args.precision_recall, "--vgg16_weights is for --precision_recall; add that, or leave it out")
    several = [f"--{flag}" for flag in ("cfg", "eval_ema") if len(getattr(args, flag)) > 1]
    if args.sweep:
        wanted = "try --eval_ema 1,2,raw --cfg 1.0:4.0:0.1 --interval 0-1,0.1-1"
        guided = set(args.cfg) != {1}  # without guidance all intervals are one
        require(bool(several) or (guided and len(args.interval or ()) > 1), f"--sweep needs several settings to choose from; {wanted}")
        whole = (args.interval_min, args.interval_max) == (defaults.interval_min, defaults.interval_max)
        require(args.interval is None or whole, "--interval, and --interval_min and --interval_max: give one of them")
        for low, high in args.interval or ():
            require(0 <= low <= high <= 1, f"--interval {low:g}-{high:g}: wanted 0 <= low <= high <= 1")
    else:
        require(not several, f"{' and '.join(several)} with several values needs --sweep")
        require(args.interval is None, "--interval is for --sweep; otherwise give --interval_min and --interval_max")
        require(args.sweep_images == defaults.sweep_images, "--sweep_images is for --sweep")


def evaluates(args: argparse.Namespace) -> bool:
    return args.online_eval or args.evaluate_gen or args.sweep


def evaluation_sizes(args: argparse.Namespace) -> list[int]:
    """Numbers of pictures that the run's evaluations draw."""
    return [args.num_images] * evaluates(args) + [args.sweep_images] * args.sweep


def trains(args: argparse.Namespace) -> bool:
    return not (args.generate or args.evaluate_gen or args.sweep)
