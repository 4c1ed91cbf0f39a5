"""The command line: argv -> Job, once.  Below it, functions take configs.

Flags are the fields of config.py, in groups, and the few here that set no field by themselves. `python flags.py` writes docs/flags.md and docs/ja/flags.md.
"""

import argparse
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from config import (
    LONG_TEXT,
    NEIGHBOURHOOD,
    SEVERAL,
    WEIGHT_CHOICES,
    AppJob,
    Averages,
    CacheJob,
    Config,
    ConvertJob,
    Data,
    DiffusionConfig,
    Drawing,
    Eval,
    EvaluateJob,
    ExportJob,
    Flag,
    GenerateJob,
    Job,
    Model,
    PrepareJob,
    ReferenceJob,
    Run,
    SamplerConfig,
    Save,
    Shards,
    Sweep,
    SweepJob,
    TextConfig,
    TextSource,
    Train,
    TrainJob,
    check_kind,
    check_value,
    flag,
    flag_of,
    require,
)
from util.errors import UserError, leave

DESCRIPTION = """Train, sample and evaluate JiT on captions or class labels. With --generate, --evaluate_gen and --sweep the settings of model, noise, text,
data and drawing come from the checkpoint where they are not given."""
DRAWING_MODES = ("generate", "evaluate_gen", "sweep")
EVALUATION_FLAGS = tuple(flag_of(f).name for f in fields(Eval) if flag_of(f) and f.name != "num_images")  # no effect where nothing is evaluated


@dataclass(frozen=True)
class TextFlags(Config):
    use_text_conditioning: bool = flag(
        False,
        "use_text_conditioning",
        "condition on captions; implied by a text model, an error with a class model",
        "キャプションで条件付けします。テキスト条件のモデルでは自動で有効、クラス条件のモデルではエラーです",
    )
    freeze_llm: bool = flag(
        True,
        "freeze_llm",
        "the language model is always frozen; --no-freeze_llm is refused",
        "言語モデルは常に凍結されます。--no-freeze_llm はエラーです",
        off="no-freeze_llm",
    )


@dataclass(frozen=True)
class DrawingFlags(Config):
    interval_min: float = flag(
        SamplerConfig.cfg_interval[0],
        "interval_min",
        "guidance acts where interval_min < t < interval_max",
        "interval_min < t < interval_max の範囲でガイダンスが働きます",
    )
    interval_max: float = flag(SamplerConfig.cfg_interval[1], "interval_max", "see --interval_min", "--interval_min を参照")
    interval: tuple[tuple[float, float], ...] | None = flag(
        None,
        "interval",
        "ranges of t for --sweep, such as `0-1,0.1-1`, in place of --interval_min and --interval_max",
        "--sweep 用の t の範囲（例: `0-1,0.1-1`）。--interval_min と --interval_max の代わりに指定します",
        several="intervals",
    )
    online_eval: bool = flag(
        False, "online_eval", "evaluate while training, every eval_freq epochs and at the end", "学習中に評価します（eval_freq エポックごとと最後）"
    )
    evaluate_gen: bool = flag(False, "evaluate_gen", "evaluate the checkpoint of --resume and stop", "--resume のチェックポイントを評価して終了します")
    sweep: bool = flag(
        False,
        "sweep",
        "evaluate the checkpoint of --resume under all combinations of --eval_ema, --cfg and --interval, then the best",
        "--resume のチェックポイントを --eval_ema、--cfg、--interval の全組み合わせで評価し、最後に最良の設定で評価します",
    )
    generate: bool = flag(
        False,
        "generate",
        "draw prompts with the checkpoint of --resume into output_dir/samples/ and stop",
        "--resume のチェックポイントでプロンプトの画像を生成し、output_dir/samples/ に保存して終了します",
    )
    prompt: tuple[str, ...] | None = flag(
        None,
        "prompt",
        "a prompt for --generate, may be given several times; a class model takes label numbers",
        "--generate で使うプロンプト。何度でも指定できます。クラス条件モデルではラベル番号です",
        shown="engine_jit.test_prompts",
        several="prompts",
    )
    prompts_file: str | None = flag(
        None, "prompts_file", "UTF-8 file with a prompt a line, for --generate", "--generate 用の、1 行に 1 プロンプトの UTF-8 ファイル"
    )


@dataclass(frozen=True)
class CacheFlags(Config):
    text_pooling: str | None = flag(
        None,
        "text_pooling",
        "one vector a caption, or the states of all its tokens",
        "キャプションごとに 1 ベクトルか、全トークンの隠れ状態",
        choices=("mean", "tokens"),
        shown="what --model reads",
    )


@dataclass(frozen=True)
class Group:
    title: str
    ja: str
    configs: tuple[type, ...]


GROUPS = (
    Group("model", "モデル", (Model,)),
    Group("text", "テキスト", (TextFlags, TextConfig, TextSource)),
    Group("data", "データ", (Data,)),
    Group("training", "学習", (Train, Averages, DiffusionConfig)),
    Group("sampling and evaluation", "生成と評価", (SamplerConfig, DrawingFlags, Drawing, Eval, Sweep)),
    Group("run", "実行", (Run, Save)),
)


def flags_in(config: type) -> Iterator[tuple[Flag, Any, Any]]:
    """Each flag of a config, its default, and the type it holds."""
    hints = typing.get_type_hints(config)
    for config_field in fields(config):
        if known := flag_of(config_field):
            hint = hints[config_field.name]
            yield known, config_field.default, typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


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
    if not set(names) <= set(WEIGHT_CHOICES):
        raise argparse.ArgumentTypeError(f"{text}: wanted 1, 2, raw, or several like 1,2,raw")
    return names


def whole_number_or_auto(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: wanted a whole number, or auto") from None


LISTS = {"numbers": numbers, "weights": weight_names, "intervals": intervals}


class Parser(argparse.ArgumentParser):
    """Keeps what is given and nothing else; says which flag was probably meant."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.options: list[str] = []

    def add(self, place: Any, known: Flag, default: Any, kind: type) -> None:
        """place: this parser or a group of it."""
        on, words = f"--{known.name}", help_of(known, default).replace("%", "%%")
        self.options += [on, f"--{known.off}"] if known.off else [on]
        if kind is bool:
            place.add_argument(on, action="store_true", help=words)
            if known.off:
                place.add_argument(f"--{known.off}", action="store_false", dest=known.name, help=f"turn off --{known.name}")
        elif known.several == "prompts":
            place.add_argument(on, action="append", help=words)
        elif known.several:
            place.add_argument(on, type=LISTS[known.several], help=words)
        else:
            kind = whole_number_or_auto if known.auto else kind
            place.add_argument(on, type=kind, choices=known.choices or None, help=words)

    def read(self, argv: Sequence[str] | None) -> dict[str, Any]:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self.options, n=1)
            self.error(f"unknown flag {unknown[0]}{f'; did you mean {near[0]}?' if near else ''}")
        return vars(args)

    def error(self, message: str) -> NoReturn:
        leave(f"error: {message}", 2)


def shown_default(known: Flag, default: Any) -> str:
    return known.shown or ("" if default is None or default is False else "on" if default is True else str(default))


def help_of(known: Flag, default: Any) -> str:
    shown = shown_default(known, default)
    return f"{known.help.replace('`', '')} (default: {shown})" if shown else known.help.replace("`", "")


def get_parser(groups: Sequence[Group] = GROUPS, description: str = DESCRIPTION) -> Parser:
    parser = Parser(description)
    for group in groups:
        place = parser.add_argument_group(group.title)
        for config in group.configs:
            for known, default, kind in flags_in(config):
                parser.add(place, known, default, kind)
    return parser


def build(cls: type, given: Mapping[str, Any], **fixed: Any) -> Any:
    """A config of what is given and of its defaults.  fixed: fields that the flags do not say one to one."""
    hints, found = typing.get_type_hints(cls), dict(fixed)
    for config_field in fields(cls):
        known, name = flag_of(config_field), config_field.name
        if name in fixed:
            continue
        if known and known.name in given:
            value = given[known.name]
            found[name] = value[0] if known.several else value
        elif is_dataclass(hints[name]):
            found[name] = build(hints[name], given)
    return cls(**found)


def parse(argv: Sequence[str] | None = None) -> Job:
    """Raises: UserError for flags that cannot work, before anything is loaded."""
    return job_of(get_parser().read(argv))


def job_of(given: Mapping[str, Any]) -> Job:
    """The job that the flags `given`, by name, ask for."""
    for group in GROUPS:
        for config in group.configs:
            for known, _, _ in flags_in(config):
                check_value(known, given.get(known.name))
    mode = mode_of(given)
    says_all = mode == "train" and given.get("lora_rank") is None  # else a checkpoint says what is not given
    model = Model()
    if says_all or "model" in given:
        model = build(Model, given)
        check_kind(model, given)
    require(
        given.get("freeze_llm", True), "--no-freeze_llm: the LLM is always frozen, since its features are computed once for the whole run; leave the flag out"
    )
    check_lists(given, mode)
    check_evaluation(given, mode)
    check_prompts(given, mode)
    shared = {
        "model": model,
        "diffusion": build(DiffusionConfig, given),
        "data": build(Data, given),
        "text": text_of(model, given) if not says_all or model.is_text else None,
        "averages": build(Averages, given),
        "drawing": build(Drawing, given, sampler=build(SamplerConfig, given, cfg_interval=interval_of(given))),
        "run": build(Run, given),
    }
    train = build(Train, given)  # its flags are checked in every mode
    require(mode == "train" or train.init_from is None, "--init_from is for training; to draw with a checkpoint give only --resume")
    if train.init_from and Path(given.get("resume", shared["run"].output_dir)) != Path(shared["run"].output_dir):
        raise UserError("--init_from starts a new run and --resume continues one: give only one of them, or give --resume the same folder as --output_dir")
    require(mode != "train" or "lora" not in given, "--lora is for drawing; to train adapters give --init_from and --lora_rank")
    if mode == "train":
        evaluation = build(Eval, given) if given.get("online_eval") else None
        return TrainJob(train=train, save=build(Save, given), evaluation=evaluation, given={} if says_all else given, **shared)
    if mode == "generate":
        return GenerateJob(prompts=tuple(given.get("prompt", ())), prompts_file=given.get("prompts_file"), given=given, **shared)
    if mode == "evaluate_gen":
        return EvaluateJob(evaluation=build(Eval, given, demands="figures"), given=given, **shared)
    return SweepJob(evaluation=build(Eval, given, demands="fid"), sweep=sweep_of(given), given=given, **shared)


def text_of(model: Model, given: Mapping[str, Any]) -> TextSource:
    """What the model reads of a caption; MM-JiT reads longer ones."""
    longer = {"max_text_len": LONG_TEXT} if model.family == "MMJiT" else {}
    text = build(TextSource, longer | given)
    return replace(text, encoder=replace(text.encoder, pooling="tokens" if model.condition == "tokens" else "mean"))


def mode_of(given: Mapping[str, Any]) -> str:
    modes = [mode for mode in (*DRAWING_MODES, "online_eval") if given.get(mode)]
    require(len(modes) <= 1, f"{' and '.join(f'--{mode}' for mode in modes)} are different runs; give one of them")
    if not modes or modes == ["online_eval"]:
        return "train"
    require(given.get("resume") is not None, f"--{modes[0]} needs a trained model: --resume FOLDER_OR_FILE")
    return modes[0]


def interval_of(given: Mapping[str, Any]) -> tuple[float, float]:
    """That of --interval_min and --interval_max."""
    low, high = SamplerConfig.cfg_interval
    return given.get("interval_min", low), given.get("interval_max", high)


def check_lists(given: Mapping[str, Any], mode: str) -> None:
    """Several values are for --sweep, and a sweep needs some."""
    ranges = given.get("interval")
    several = [f"--{name}" for name in ("cfg", "eval_ema") if len(given.get(name, ())) > 1]
    if mode != "sweep":
        require(not several, f"{' and '.join(several)} with several values needs --sweep")
        require(ranges is None, "--interval is for --sweep; otherwise give --interval_min and --interval_max")
        require(given.get("sweep_images", Sweep.images) == Sweep.images, "--sweep_images is for --sweep")
        return
    guided = "cfg" not in given or set(given["cfg"]) != {1}  # without guidance all intervals are one; the checkpoint may have some
    require(bool(several) or (guided and len(ranges or ()) > 1), SEVERAL)
    require(ranges is None or interval_of(given) == SamplerConfig.cfg_interval, "--interval, and --interval_min and --interval_max: give one of them")
    for low, high in ranges or ():
        require(0 <= low <= high <= 1, f"--interval {low:g}-{high:g}: wanted 0 <= low <= high <= 1")


def check_evaluation(given: Mapping[str, Any], mode: str) -> None:
    evaluates = mode in ("evaluate_gen", "sweep") or bool(given.get("online_eval"))
    for name in EVALUATION_FLAGS:
        require(evaluates or not given.get(name), f"--{name} has no effect without --online_eval, --evaluate_gen or --sweep")
    sizes = [given.get("num_images", Eval.num_images), *([given.get("sweep_images", Sweep.images)] if mode == "sweep" else [])]
    few = min(sizes) <= NEIGHBOURHOOD and given.get("precision_recall")
    require(not few, f"--precision_recall needs more than {NEIGHBOURHOOD} pictures, and {min(sizes)} are asked for")


def check_prompts(given: Mapping[str, Any], mode: str) -> None:
    for name in ("prompt", "prompts_file"):
        require(given.get(name) is None or mode == "generate", f"--{name} is for --generate")
    require(given.get("prompt") is None or given.get("prompts_file") is None, "--prompt and --prompts_file: give one of them")


def sweep_of(given: Mapping[str, Any]) -> Sweep:
    return build(Sweep, given, weights=given.get("eval_ema", ()), scales=given.get("cfg", ()), intervals=given.get("interval", ()))


def parse_cache(argv: Sequence[str] | None = None) -> CacheJob:
    """cache_text.py: a training command, or just its data and text flags."""
    groups = (*GROUPS, Group("text cache", "テキストキャッシュ", (CacheFlags,)))
    given = get_parser(groups, "Encode a data set's captions ahead of time: a training command with cache_text.py in place of main_jit.py.").read(argv)
    given.setdefault("model", "JiT-B/16-Text")
    require(
        "lora_rank" not in given,
        "--lora_rank is not for cache_text.py; give the base model's --model and text flags instead (training adapters also fills the text cache by itself)",
    )
    asked = {name: given.pop(name, None) for name in ("prompt", "prompts_file")}  # which training does not take
    check_prompts(asked, "generate")
    job = job_of(given)
    require(job.model.is_text, f"--model {job.model.name} is a class model and has no captions; try --model {job.model.name}-Text")
    require(job.text.cache == "disk", f"--text_cache {job.text.cache} stores nothing on disk, so cache_text.py has nothing to do; leave out --text_cache")
    pooling = build(CacheFlags, given).text_pooling or job.text.encoder.pooling
    text = replace(job.text, encoder=replace(job.text.encoder, pooling=pooling))
    captions = job.evaluation.captions if isinstance(job, TrainJob) and job.evaluation else None
    return CacheJob(job.model, job.data, text, job.run, tuple(asked["prompt"] or ()), asked["prompts_file"], captions)


def parse_reference(argv: Sequence[str] | None = None) -> ReferenceJob:
    """prepare_ref.py: the few flags that decide reference statistics."""
    shared = ("data_path", "data_format", "image_column", "caption_column", "image_root", "img_size", "missing_captions", "inception_weights")
    shared += ("num_workers", "device")
    parser = Parser("Compute reference statistics for FID from a data set, with the crop that training uses.")
    for config in (Data, Model, Eval, Run):
        for known, default, kind in flags_in(config):
            if known.name in shared:
                parser.add(parser, known, default, kind)
    parser.add_argument("--out", required=True, help="the .npz to write")
    parser.options.append("--out")
    given = parser.read(argv)
    for known, _, _ in flags_in(Model):
        check_value(known, given.get(known.name))
    require(Path(given["out"]).suffix == ".npz", f"--out {given['out']}: wanted a file name that ends in .npz")
    size, weights = given.get("img_size", Model.img_size), build(Eval, given).inception_weights
    return ReferenceJob(build(Data, given), size, weights, given["out"], build(Run, given).device)


def parse_prepare(argv: Sequence[str] | None = None) -> PrepareJob:
    """prepare_data.py."""
    shared = ("data_path", "data_format", "image_column", "caption_column", "image_root", "img_size", "missing_captions", "bad_images", "num_workers", "device")
    parser = Parser("Convert captioned pictures to tar shards at training size, with an index.")
    for config in (Data, Model, Shards, TextConfig, Run):
        for known, default, kind in flags_in(config):
            if known.name in shared or config in (Shards, TextConfig):
                shown = "none: pictures alone" if known.name == "llm_model_name" else known.shown
                parser.add(parser, replace(known, shown=shown), default, kind)
    given = parser.read(argv)
    for known, _, _ in flags_in(Model):
        check_value(known, given.get(known.name))
    text = build(TextConfig, given) if "llm_model_name" in given else None
    idle = [known.name for known, _, _ in flags_in(TextConfig) if known.name in given and not text]
    require(not idle, f"--{'/'.join(idle)} has no effect without --llm_model_name, which encodes the captions too")
    return PrepareJob(build(Data, given), given.get("img_size", Model.img_size), build(Shards, given), text, build(Run, given).device)


def parse_export(argv: Sequence[str] | None = None) -> ExportJob:
    """export.py."""
    return parse_alone(ExportJob, "Export a trained model: safetensors, a model card and, with --diffusers, a folder for diffusers.", argv)


def parse_convert(argv: Sequence[str] | None = None) -> ConvertJob:
    """convert_checkpoint.py."""
    return parse_alone(ConvertJob, "Convert a checkpoint in parts to one file, or with --parts one file to parts.", argv)


def parse_app(argv: Sequence[str] | None = None) -> AppJob:
    """app.py."""
    return parse_alone(AppJob, "Serve a page in the browser to type prompts into.", argv)


def parse_alone(cls: type, description: str, argv: Sequence[str] | None) -> Any:
    """A program whose flags are one config's."""
    parser = Parser(description)
    for known, default, kind in flags_in(cls):
        parser.add(parser, known, default, kind)
    return build(cls, parser.read(argv))


# --- docs/flags.md


HEADINGS = {
    "en": (
        "# Flags",
        "[日本語](ja/flags.md)",
        "Defaults are those of training. With `--generate`, `--evaluate_gen` and `--sweep` the settings of model, noise, text, data and drawing come from the "
        "checkpoint where they are not given.",
        "Written by `python flags.py` from the fields of `config.py` and `flags.py`.",
    ),
    "ja": (
        "# フラグ",
        "[English](../flags.md)",
        "既定値は学習時のものです。`--generate`、`--evaluate_gen`、`--sweep` では、指定しなかったモデル、ノイズ、テキスト、データ、生成の設定はチェックポイントの値になります。",
        "`config.py` と `flags.py` のフィールドから `python flags.py` で生成しています。",
    ),
}
COLUMNS = {"en": ("flag", "default", "values", "meaning"), "ja": ("フラグ", "既定値", "値", "意味")}
SHOWN_JA = {
    "on": "有効",
    "all": "すべて",
    "77; 256 for MMJiT": "77、MMJiT は 256",
    "what --model reads": "--model が読む形",
    "the table's folder": "表のあるフォルダ",
    "image or file_name": "image または file_name",
    "text or texts": "text または texts",
    "the data's captions": "データのキャプション",
    "computed from the data": "データから計算",
    "no clipping": "制限なし",
    "the whole model is trained": "モデル全体を学習",
    "at ends of epochs only": "エポックの終わりのみ",
    "on with a GPU (except --generate), off on a CPU": "GPU では有効（--generate を除く）、CPU では無効",
    "on for classes, off for text": "クラスは有効、テキストは無効",
    "what the checkpoint says, else 0": "チェックポイントの続き、なければ 0",
    "blr x effective batch / 256": "blr x 実効バッチ / 256",
    "torch's cache, else a download into it": "torch のキャッシュ、なければダウンロード",
    "as for --inception_weights": "--inception_weights と同様",
    "text_cache in data_path, or in output_dir where that is read-only": "data_path の text_cache、書き込めなければ output_dir の text_cache",
}


def markdown(language: str) -> str:
    """The page of all flags, "en" or "ja"."""
    lines = "\n\n".join(HEADINGS[language]).split("\n")
    for group in GROUPS:
        title = group.title[0].upper() + group.title[1:] if language == "en" else group.ja
        lines += ["", f"## {title}", "", f"| {' | '.join(COLUMNS[language])} |", "|---|---|---|---|"]
        for config in group.configs:
            for known, default, _ in flags_in(config):
                shown = shown_default(known, default[0] if known.several == "numbers" and isinstance(default, tuple) else default)
                shown = SHOWN_JA.get(shown, shown) if language == "ja" else shown
                values = ", ".join(f"`{choice}`" for choice in known.choices) or (
                    known.bounds.shown + (", `auto`" if known.auto else "") if known.bounds else ""
                )
                names = f"`--{known.name}`" + (f" `--{known.off}`" if known.off else "")
                lines.append(f"| {names} | {shown} | {values} | {known.help if language == 'en' else known.ja} |")
    return "\n".join(lines) + "\n"


def write_docs(folder: Path) -> None:
    for language, path in (("en", folder / "flags.md"), ("ja", folder / "ja" / "flags.md")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(language), encoding="utf-8")


if __name__ == "__main__":
    write_docs(Path(__file__).parent / "docs")
