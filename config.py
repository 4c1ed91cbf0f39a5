"""What a run is: frozen dataclasses whose fields carry their flag, default, bounds and help; their validity; to plain data and back.

No torch here: `--help` and a wrong flag are told before torch is imported. A config that cannot work cannot be made, whether from flags, from
a checkpoint or in a notebook.
"""

import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

from util.errors import UserError

SIZES = {  # models_jit.SIZES and models_mmjit.SIZES say what they are
    "JiT": ("Nano", "Ti", "S", "B", "L", "H", "G"),
    "MMJiT": ("Nano", "Ti", "S", "B", "M", "L", "XL"),
}
CONDITIONS = {("JiT", ""): "labels", ("JiT", "-Text"): "pooled", ("JiT", "-Tokens"): "tokens", ("MMJiT", ""): "tokens"}
SOLVERS = ("heun", "euler", "ab2", "dpmpp2m")  # denoiser.SOLVERS has them
WEIGHT_CHOICES = ("1", "2", "raw")  # EMA 1, EMA 2, the network's own weights
LAYERS = ("last", "-2", "middle", "mean")
SEVERAL = "--sweep needs several settings to choose from; try --eval_ema 1,2,raw --cfg 1.0:4.0:0.1 --interval 0-1,0.1-1"
NEIGHBOURHOOD = 3  # nearest neighbours that span the manifold in precision and recall
C = TypeVar("C")


@dataclass(frozen=True)
class Bounds:
    shown: str
    must: str
    hold: Callable[[float], bool]


AT_LEAST_1 = Bounds("≥ 1", "be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Bounds("≥ 0", "not be negative", lambda value: value >= 0)
POSITIVE = Bounds("> 0", "be positive", lambda value: value > 0)
SHARE = Bounds("[0, 1]", "be in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_1 = Bounds("[0, 1)", "be in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class Flag:
    """How the command line says a field, and what documents it."""

    name: str
    help: str
    ja: str
    bounds: Bounds | None = None
    choices: tuple[str, ...] = ()
    several: str = ""  # how a list is written: "numbers", "weights" or "intervals" for --sweep, "prompts" by giving the flag again
    off: str = ""  # the flag that turns it off
    auto: bool = False  # whether it may be `auto`, which is None here
    shown: str = ""  # the default in words, where None stands for something


def flag(default: Any, name: str, help: str, ja: str, **options: Any) -> Any:
    """A field that is a flag too.  options: those of Flag."""
    return field(default=default, metadata={"flag": Flag(name, help, ja, **options)})


def flag_of(config_field: Field) -> Flag | None:
    return config_field.metadata.get("flag")


class Config:
    """Base of the dataclasses below.  Raises: UserError, naming the flag, for a value that cannot work."""

    def __post_init__(self):
        for config_field in fields(self):
            if known := flag_of(config_field):
                check_value(known, getattr(self, config_field.name))
        self.check()

    def check(self) -> None:
        """Checks what concerns several fields."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def check_value(known: Flag, value: Any) -> None:
    """Raises: UserError for a value out of bounds, or that is none of the choices."""
    if value is None or isinstance(value, bool):
        return
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float):
            require(math.isfinite(one), f"--{known.name} {one} must be a finite number")
        if known.bounds:
            require(known.bounds.hold(one), f"--{known.name} {one} must {known.bounds.must}")
        require(not known.choices or one in known.choices, f"--{known.name} {one}: wanted one of {', '.join(known.choices)}")


def check_lora(folder: str | None, scale: float) -> None:
    require(scale == 1 or folder is not None, "--lora_scale is for --lora; give the adapters' folder with --lora")


class ModelName(NamedTuple):
    """'JiT-B/16-Text' is ('JiT', 'B', 16, '-Text')."""

    family: str
    size: str
    patch: int
    suffix: str

    @property
    def condition(self) -> str:
        """What its y is: "labels", "pooled" text, or the text's "tokens"."""
        return CONDITIONS[self.family, self.suffix]


def parse_model_name(name: str) -> ModelName:
    """Raises: ValueError for a name that no network has."""
    match = re.fullmatch(r"(\w+)-(\w+)/([1-9]\d*)(-\w+)?", name)
    known = ModelName(match[1], match[2], int(match[3]), match[4] or "") if match else None
    if not known or (known.family, known.suffix) not in CONDITIONS or known.size not in SIZES[known.family]:
        names = [f"{family}-SIZE/PATCH{suffix}" for family, suffix in CONDITIONS]
        sizes = "; ".join(f"of {family} {', '.join(sizes)}" for family, sizes in SIZES.items())
        raise ValueError(f"{name!r} is no model; wanted {', '.join(names[:-1])} or {names[-1]}; sizes {sizes}")
    return known


@dataclass(frozen=True)
class Model(Config):
    name: str = flag(
        "JiT-B/16",
        "model",
        "`JiT-SIZE/PATCH` for classes, `JiT-SIZE/PATCH-Tokens` or `MMJiT-SIZE/PATCH` for text, `JiT-SIZE/PATCH-Text` for text as one vector; any patch size",
        "クラスは `JiT-SIZE/PATCH`、テキストは `JiT-SIZE/PATCH-Tokens` か `MMJiT-SIZE/PATCH`、1 ベクトルのテキストは `JiT-SIZE/PATCH-Text`。パッチサイズは任意です",
    )
    img_size: int = flag(
        256, "img_size", "width and height of the pictures, a multiple of the patch size", "画像の縦横のピクセル数。パッチサイズの倍数にします", bounds=POSITIVE
    )
    attn_dropout: float = flag(
        0.0,
        "attn_dropout",
        "dropout of the attention weights, in the middle half of the blocks",
        "アテンション重みの dropout（中央半分のブロックのみ）",
        bounds=BELOW_1,
    )
    proj_dropout: float = flag(
        0.0,
        "proj_dropout",
        "dropout after attention and in the MLP, in the middle half of the blocks (the paper: 0.2 for H)",
        "アテンションの後と MLP 内の dropout（中央半分のブロックのみ、論文の H では 0.2）",
        bounds=BELOW_1,
    )
    class_num: int = flag(1000, "class_num", "classes of a class model", "クラス条件モデルのクラス数", bounds=AT_LEAST_1)

    @property
    def family(self) -> str:
        return parse_model_name(self.name).family

    @property
    def is_text(self) -> bool:
        return self.condition != "labels"

    @property
    def condition(self) -> str:
        return parse_model_name(self.name).condition

    def check(self) -> None:
        try:
            patch = parse_model_name(self.name).patch
        except ValueError as error:
            raise UserError(f"--model {error}") from error
        smaller = self.img_size // patch * patch or patch
        require(self.img_size % patch == 0, f"--img_size {self.img_size} is not a multiple of the patch size {patch} of --model {self.name}; try {smaller}")
        dropout = self.attn_dropout or self.proj_dropout
        require(not dropout or self.family == "JiT", f"--attn_dropout and --proj_dropout have no effect on --model {self.name}: MM-JiT has no dropout")


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """What the noise is; training and sampling must agree on it (defaults: the paper's table 9, 256 pixels)."""

    P_mean: float = flag(-0.8, "P_mean", "t = sigmoid(P_mean + P_std x normal)", "t = sigmoid(P_mean + P_std x 正規乱数)")
    P_std: float = flag(0.8, "P_std", "see --P_mean", "--P_mean を参照", bounds=POSITIVE)
    noise_scale: float = flag(
        1.0, "noise_scale", "standard deviation of the noise: img_size / 256 in the paper", "ノイズの標準偏差。論文では img_size / 256", bounds=POSITIVE
    )
    t_eps: float = flag(0.05, "t_eps", "lower limit of 1 - t where it is a divisor", "除算に使う 1 - t の下限", bounds=BELOW_1)

    def check(self) -> None:
        require(self.t_eps > 0, "--t_eps 0 would divide by zero at t = 1; the paper uses 0.05")


@dataclass(frozen=True)
class SamplerConfig(Config):
    method: str = flag(
        "heun",
        "sampling_method",
        "solver: `heun` calls the network twice a step, the others once; `ab2` and `dpmpp2m` need the fewest calls (docs/running.md)",
        "ソルバー。`heun` は 1 ステップに 2 回、他は 1 回ネットワークを呼びます。呼び出しが最も少なくて済むのは `ab2` と `dpmpp2m` です（docs/ja/running.md）",
        choices=SOLVERS,
    )
    steps: int = flag(50, "num_sampling_steps", "steps of the solver from noise to picture", "ノイズから画像までのソルバーのステップ数", bounds=AT_LEAST_1)
    cfg_scale: float = flag(
        1.0,
        "cfg",
        "scale of classifier-free guidance; 1 is none; for --sweep several: `1.5,2,3` or `1.0:4.0:0.1`",
        "classifier-free guidance の強さ。1 はガイダンスなし。--sweep では `1.5,2,3` や `1.0:4.0:0.1` のように複数指定できます",
        bounds=NOT_NEGATIVE,
        several="numbers",
    )
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # range of t where guidance acts
    time_shift: float = flag(
        1.0,
        "time_shift",
        "above 1 the steps near the noise are shorter, 1 is even steps",
        "1 より大きいとノイズ側のステップが細かくなります。1 は等間隔",
        bounds=POSITIVE,
    )

    def check(self) -> None:
        low, high = self.cfg_interval
        require(0 <= low <= high <= 1, f"--interval_min {low} --interval_max {high}: wanted 0 <= interval_min <= interval_max <= 1")


@dataclass(frozen=True)
class TextConfig(Config):
    """What decides a caption's features, besides the model's files."""

    llm: str = flag(
        "llm-jp/llm-jp-3-3.7b",
        "llm_model_name",
        "frozen language model: a Hugging Face hub name or a folder",
        "凍結した言語モデル。Hugging Face Hub の名前かフォルダ",
    )
    max_text_len: int = flag(
        77,
        "max_text_len",
        "tokens of a caption that are read; the rest is cut off",
        "キャプションから読み込むトークン数。残りは切り捨てます",
        bounds=AT_LEAST_1,
        shown="77; 256 for MMJiT",
    )
    layer: str = flag(
        "mean",
        "llm_layer",
        "states that become features: the `last` or next to last (`-2`) layer's, the `middle` one's, or the `mean` over all of RMS-normalised states",
        "特徴量にする層: 最終層 `last`、最後から 2 番目 `-2`、中央の層 `middle`、RMS 正規化した全層の平均 `mean`",
        choices=LAYERS,
    )
    pooling: str = "mean"  # or "tokens": every token's state
    dtype: str = flag(
        "auto",
        "llm_dtype",
        "type the language model runs in; auto: that of the checkpoint, else of the text cache, else bf16 on a GPU that computes in it and fp32 elsewhere",
        "言語モデルの計算精度。auto はチェックポイント、なければテキストキャッシュに合わせ、どちらもなければ bf16 を計算できる GPU で bf16、それ以外は fp32",
        choices=("auto", "fp32", "bf16"),
    )
    revision: str | None = None  # of a hub name
    trust_remote_code: bool = flag(
        False,
        "trust_remote_code",
        "run the Python code that the language model brings along; only for authors you trust",
        "言語モデルに同梱された Python コードを実行します。作者を信頼できる場合に限ります",
    )


@dataclass(frozen=True)
class TextSource(Config):
    """Where the features of captions come from."""

    encoder: TextConfig = field(default_factory=TextConfig)
    cache: str = flag(
        "disk",
        "text_cache",
        "features of each distinct caption once, on `disk` or in `memory`; `off`: the language model runs in every step, for captions too varied to store",
        "異なるキャプションごとに一度だけ計算した特徴量の置き場所。`disk` か `memory`。`off` は毎ステップ言語モデルを実行します（種類が多すぎて保存できない場合）",
        choices=("disk", "memory", "off"),
    )
    folder: str | None = flag(
        None,
        "text_cache_dir",
        "folder of the text cache",
        "テキストキャッシュのフォルダ",
        shown="text_cache in data_path, or in output_dir where that is read-only",
    )
    norm: str = flag(
        "standardize",
        "text_norm",
        "`standardize`: text features to mean 0 and variance 1 per dimension over the training captions; `rms`: each to the length √width; or `none`",
        "`standardize` は学習キャプション全体で各次元を平均 0、分散 1 にします。`rms` は長さを √次元数 にそろえます。`none` は何もしません",
        choices=("none", "rms", "standardize"),
    )

    def check(self) -> None:
        require(self.cache == "disk" or self.folder is None, f"--text_cache_dir has no effect with --text_cache {self.cache}")


@dataclass(frozen=True)
class Data(Config):
    path: str = flag(
        "./data",
        "data_path",
        "folder with images/ and captions/ (text) or train/<class>/ (classes), a table of pictures and captions, Parquet files or tar shards; docs/data.md",
        "images/ と captions/（テキスト）または train/<class>/（クラス）があるフォルダ、画像とキャプションの表、Parquet、tar。docs/ja/data.md を参照",
    )
    format: str = flag(
        "auto",
        "data_format",
        "format of --data_path; give it only where auto cannot decide",
        "--data_path の形式（自動で決まらないとき）",
        choices=("auto", "folder", "table", "parquet", "tar", "shards"),
    )
    image_column: str | None = flag(
        None,
        "image_column",
        "column of a table or of Parquet files with pictures or the names of their files",
        "画像、または画像ファイル名の列（表、Parquet）",
        shown="image or file_name",
    )
    caption_column: str | None = flag(
        None,
        "caption_column",
        "column with a caption or a list of captions; in tar shards, of the .json, in place of the .txt",
        "キャプション（またはそのリスト）の列。tar では .txt の代わりに .json のその項目を読みます",
        shown="text or texts",
    )
    image_root: str | None = flag(
        None,
        "image_root",
        "folder that a table's file names start from",
        "表のファイル名の起点になるフォルダ",
        shown="the table's folder",
    )
    crop: str = flag(
        "center",
        "crop",
        "the square that is trained on: the middle, or ADM's random crop (never for reference statistics)",
        "学習で使う正方形。center は中央、random は ADM のランダムクロップ（参照統計では常に center）",
        choices=("center", "random"),
    )
    missing: str = flag(
        "error",
        "missing_captions",
        "what to do with pictures without captions and captions without a picture",
        "キャプションのない画像と画像のないキャプションの扱い",
        choices=("error", "skip"),
    )
    broken: str = flag(
        "skip",
        "bad_images",
        "what to do with broken pictures; skipped ones are listed in bad_images.txt in the output folder; in training more than 1 % is an error",
        "壊れた画像の扱い。飛ばした画像は出力先の bad_images.txt に記録され、学習では 1 % を超えるとエラーになります",
        choices=("error", "skip"),
    )
    hflip: bool | None = flag(
        None,
        "hflip",
        "random horizontal flip; left, right and letters would be wrong for captions",
        "ランダムな左右反転。キャプション付き画像では左右や文字が合わなくなります",
        off="no-hflip",
        shown="on for classes, off for text",
    )
    held_out: int = flag(
        64,
        "held_out",
        "pictures kept out of training to measure text_gap on, at most 1 % of all; if none are kept out, it is measured on training pictures",
        "text_gap を測るために学習から除く画像の数（全体の 100 分の 1 まで）。取り分ける画像がなければ（100 枚未満のデータも含む）学習画像で測ります",
        bounds=NOT_NEGATIVE,
    )
    workers: int = flag(
        12,
        "num_workers",
        "loader processes per training process, at most its share of the cores",
        "学習プロセスあたりのデータローダーのワーカー数（このプロセスに割り当てられるコア数まで）",
        bounds=NOT_NEGATIVE,
    )
    pin_mem: bool = flag(True, "pin_mem", "page-locked memory for faster copies to the GPU", "GPU への転送を速くするページロックメモリ", off="no_pin_mem")


@dataclass(frozen=True)
class Train(Config):
    epochs: int = flag(200, "epochs", "passes over the data, the resumed ones included", "データを通す回数（再開前の分を含む）", bounds=AT_LEAST_1)
    warmup_epochs: float = flag(
        5.0, "warmup_epochs", "epochs of linear warm-up of the learning rate from 0", "学習率を 0 から線形に上げるエポック数", bounds=NOT_NEGATIVE
    )
    batch_size: int = flag(
        128,
        "batch_size",
        "pictures per process and micro-batch; effective batch = batch_size x accum_iter x processes",
        "1 プロセスのマイクロバッチあたりの画像数。実効バッチ = batch_size x accum_iter x プロセス数",
        bounds=AT_LEAST_1,
    )
    accum_iter: int = flag(
        1,
        "accum_iter",
        "gradient accumulation: micro-batches per optimizer step",
        "勾配累積の回数（オプティマイザの 1 ステップあたりのマイクロバッチ数）",
        bounds=AT_LEAST_1,
    )
    optimizer: str = flag(
        "adamw",
        "optimizer",
        "`muon`: Muon for the matrices of the blocks, AdamW for the rest, at AdamW's learning rates (docs/running.md)",
        "`muon` はブロックの行列に Muon、残りに AdamW を使います。学習率は AdamW と同じ値でかまいません（docs/ja/running.md）",
        choices=("adamw", "muon"),
    )
    lr: float | None = flag(None, "lr", "absolute learning rate", "学習率の絶対値", bounds=POSITIVE, shown="blr x effective batch / 256")
    blr: float = flag(5e-5, "blr", "base learning rate, per 256 pictures", "256 枚あたりの基準学習率", bounds=POSITIVE)
    min_lr: float = flag(0.0, "min_lr", "final learning rate of --lr_schedule cosine", "--lr_schedule cosine の終わりの学習率", bounds=NOT_NEGATIVE)
    lr_schedule: str = flag("constant", "lr_schedule", "learning rate after the warm-up", "ウォームアップ後の学習率", choices=("constant", "cosine"))
    weight_decay: float = flag(
        0.0, "weight_decay", "weight decay, not applied to biases and norms", "重み減衰（バイアスと正規化層を除く）", bounds=NOT_NEGATIVE
    )
    grad_clip: float | None = flag(None, "grad_clip", "largest gradient norm", "勾配ノルムの上限", bounds=POSITIVE, shown="no clipping")
    label_drop_prob: float = flag(
        0.1,
        "label_drop_prob",
        "share of captions or labels replaced by the null, for guidance",
        "ガイダンスのために空の条件に置き換えるキャプションやラベルの割合",
        bounds=SHARE,
    )
    init_from: str | None = flag(
        None,
        "init_from",
        "checkpoint whose EMA 1 gives a new run its initial weights; its condition and language model may differ. Optimizer, EMAs and step count start anew",
        "新しい学習の初期重みにするチェックポイント（EMA 1 を使います）。条件の種類や言語モデルは違ってもかまいません。オプティマイザ、EMA、ステップ数は最初からです",
    )
    lora_rank: int | None = flag(
        None,
        "lora_rank",
        "train LoRA adapters of this rank for the model of --init_from; that model stays frozen, and settings that are not given come from it; needs peft",
        "--init_from のモデルはそのままにして、このランクのアダプタ（LoRA）だけを学習します。指定しない設定はそのモデルの値になります。peft が必要です",
        bounds=AT_LEAST_1,
        shown="the whole model is trained",
    )
    grad_checkpointing: str = flag(
        "off",
        "grad_checkpointing",
        "`blocks`: keep only the inputs of each block and compute it again in the backward pass; about a third more time, a fraction of the memory (docs/running.md)",
        "`blocks` なら各ブロックの入力だけを保存し、逆伝播で計算し直します。時間は約 3 分の 1 増え、メモリは大きく減ります（docs/ja/running.md）",
        choices=("off", "blocks"),
    )
    parallel: str = flag(
        "ddp",
        "parallel",
        "how processes share the work: `ddp` keeps the whole model on each process; `fsdp` shards weights, EMAs and optimizer over all processes; "
        "`hsdp` shards them within a node, and every node holds a full copy",
        "プロセス間の分担。`ddp` は各プロセスがモデル全体を持ちます。`fsdp` は重み、EMA、オプティマイザを分割して持ち、`hsdp` はノード内で分割し、ノード間では同じものを持ちます",
        choices=("ddp", "fsdp", "hsdp"),
    )
    start_epoch: int | None = flag(None, "start_epoch", "number of the first epoch", "最初のエポックの番号", shown="what the checkpoint says, else 0")
    log_freq: int = flag(100, "log_freq", "steps between lines of the log", "ログの間隔（ステップ数）", bounds=AT_LEAST_1)

    def check(self) -> None:
        require(self.lr is None or self.blr == Train.blr, "--lr and --blr: give one of them")
        require(self.min_lr == 0 or self.lr_schedule == "cosine", "--min_lr is for --lr_schedule cosine; add --lr_schedule cosine, or leave out --min_lr")
        require(
            self.lora_rank is None or self.parallel == "ddp",
            f"--lora_rank trains only a few weights, so there is nothing to shard; leave out --parallel {self.parallel}",
        )
        require(
            self.optimizer == "adamw" or (self.parallel == "ddp" and self.lora_rank is None),
            f"--optimizer {self.optimizer} needs whole weight matrices; leave out {'--lora_rank' if self.lora_rank else f'--parallel {self.parallel}'}",
        )
        require(self.lora_rank is None or self.init_from is not None, "--lora_rank trains adapters for an existing model; give that model with --init_from")
        start = self.start_epoch or 0
        require(0 <= start < self.epochs, f"--start_epoch {start} must be in [0, epochs), and --epochs is {self.epochs}")

    def effective_batch(self, processes: int) -> int:
        """Pictures of one optimizer step, over all processes."""
        return self.batch_size * self.accum_iter * processes

    def peak_lr(self, processes: int) -> float:
        return self.blr * self.effective_batch(processes) / 256 if self.lr is None else self.lr


@dataclass(frozen=True)
class Averages(Config):
    decay1: float = flag(
        0.9999,
        "ema_decay1",
        "decay of EMA 1 of the weights; EMA 1 draws unless --eval_ema says otherwise",
        "EMA 1（重みの移動平均）の減衰率。--eval_ema がなければこれで生成します",
        bounds=BELOW_1,
    )
    decay2: float = flag(0.9996, "ema_decay2", "decay of EMA 2 of the weights", "EMA 2 の減衰率", bounds=BELOW_1)
    warmup: bool = flag(
        True,
        "ema_warmup",
        "start both EMAs with the decay min(decay, (1 + n) / (10 + n)) at step n; off: the given decay from the first step on",
        "はじめは min(decay, (1 + n) / (10 + n)) の減衰率にします。無効にすると最初のステップから指定どおりです",
        off="no_ema_warmup",
    )


@dataclass(frozen=True)
class Save(Config):
    every_epochs: int = flag(5, "save_last_freq", "epochs between writings of checkpoint-last.pth", "checkpoint-last.pth を書くエポック間隔", bounds=AT_LEAST_1)
    every_steps: int | None = flag(
        None,
        "save_freq_steps",
        "also write checkpoint-last.pth every this many steps, within epochs too",
        "ステップ単位の保存間隔（エポックの途中でも保存）",
        bounds=AT_LEAST_1,
        shown="at ends of epochs only",
    )
    keep_last: int | None = flag(
        None,
        "keep_last",
        "how many of the numbered checkpoints, of every 100th epoch, to keep",
        "100 エポックごとの番号付きチェックポイントを残す数",
        bounds=AT_LEAST_1,
        shown="all",
    )
    eval_every: int = flag(40, "eval_freq", "epochs between evaluations within training", "学習中の評価のエポック間隔", bounds=AT_LEAST_1)


@dataclass(frozen=True)
class Drawing(Config):
    weights: str = flag(
        "1",
        "eval_ema",
        "weights to draw with: EMA `1` or `2`, or `raw`; for --sweep several: `1,2,raw`",
        "生成に使う重み: EMA `1`、`2`、または EMA なしの `raw`。--sweep では `1,2,raw` のように複数指定できます",
        choices=WEIGHT_CHOICES,
        several="weights",
    )
    batch_size: int | None = flag(
        256,
        "gen_bsz",
        "pictures drawn at a time per process; `auto`: 256, halved until they fit into the GPU's memory",
        "1 プロセスが一度に生成する枚数。`auto` は 256 から始め、GPU のメモリに入らなければ半分にします",
        bounds=AT_LEAST_1,
        auto=True,
    )
    lora: str | None = flag(
        None,
        "lora",
        "folder with adapters for the model of --resume, as --lora_rank or peft wrote it; the pictures are written into it",
        "--resume のモデルに足すアダプタのフォルダ（--lora_rank か peft が書いたもの）。画像もそこに書きます",
    )
    lora_scale: float = flag(1.0, "lora_scale", "scale of the adapters; 0 is the model without them", "アダプタを足す強さ。0 なら元のモデルのまま")
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def check(self) -> None:
        check_lora(self.lora, self.lora_scale)


@dataclass(frozen=True)
class Eval(Config):
    num_images: int = flag(50000, "num_images", "pictures of an evaluation", "評価で生成する枚数", bounds=AT_LEAST_1)
    save_images: bool = flag(
        False, "save_images", "keep an evaluation's pictures as PNG, below output_dir/eval/", "評価で生成した画像を output_dir/eval/ 以下に PNG で残します"
    )
    fid_stats: str | None = flag(
        None,
        "fid_stats",
        "reference statistics (.npz with mu and sigma); see prepare_ref.py",
        "参照統計（mu と sigma を持つ .npz）。prepare_ref.py を参照",
        shown="computed from the data",
    )
    inception_weights: str | None = flag(
        None,
        "inception_weights",
        "file of torch-fidelity's Inception weights; `none`: no FID and IS",
        "torch-fidelity の Inception の重みファイル。`none` なら FID と IS を測りません",
        shown="torch's cache, else a download into it",
    )
    captions: str | None = flag(
        None,
        "eval_captions",
        "captions to draw in evaluations: a UTF-8 file, one a line, or a folder of .txt",
        "評価に使うキャプション。1 行 1 件の UTF-8 ファイル、または .txt のフォルダ",
        shown="the data's captions",
    )
    clip_model: str | None = flag(
        None,
        "clip_model",
        "CLIP for CLIP score and R-precision, a hub name or a folder, such as llm-jp/waon-siglip2-base-patch16-256",
        "CLIP スコアと R-precision 用の CLIP。Hub の名前かフォルダ（例: llm-jp/waon-siglip2-base-patch16-256）",
    )
    precision_recall: bool = flag(False, "precision_recall", "also measure precision and recall, with VGG16", "VGG16 による precision と recall も測ります")
    vgg16_weights: str | None = flag(
        None,
        "vgg16_weights",
        "file of torchvision's VGG16 weights, for --precision_recall",
        "--precision_recall 用の torchvision の VGG16 の重みファイル",
        shown="as for --inception_weights",
    )
    fd_dinov2: str | None = flag(
        None,
        "fd_dinov2",
        "also measure FD-DINOv2 with this model: facebook/dinov2-large, or a folder",
        "指定したモデル（facebook/dinov2-large またはフォルダ）で FD-DINOv2 も測ります",
    )
    demands: str = ""  # what the run cannot do without: "fid" for a sweep, "figures" for --evaluate_gen

    def check(self) -> None:
        require(
            self.vgg16_weights is None or self.precision_recall,
            "--vgg16_weights is for --precision_recall; add --precision_recall, or leave out --vgg16_weights",
        )


@dataclass(frozen=True)
class Sweep(Config):
    """All combinations of weights, scales and intervals."""

    images: int = flag(
        8000,
        "sweep_images",
        "pictures of each combination of --sweep; the best is evaluated with --num_images",
        "--sweep の各組み合わせの枚数。最良の設定は --num_images で評価します",
        bounds=AT_LEAST_1,
    )
    weights: tuple[str, ...] = ()  # empty, like the others: what the checkpoint draws with
    scales: tuple[float, ...] = ()
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Run(Config):
    output_dir: str = flag(
        "./output_dir",
        "output_dir",
        "checkpoints, TensorBoard events, pictures; --generate, --evaluate_gen and --sweep write to the checkpoint's folder unless this flag is given",
        "チェックポイント、TensorBoard のログ、画像の出力先。--generate、--evaluate_gen、--sweep では省略するとチェックポイントのあるフォルダに書きます",
    )
    resume: str | None = flag(
        None,
        "resume",
        "checkpoint file, or folder with checkpoint-last.pth; may be output_dir itself, even before it holds a checkpoint",
        "チェックポイントのファイル、または checkpoint-last.pth のあるフォルダ。まだチェックポイントのない output_dir 自身でもかまいません",
    )
    device: str = flag("auto", "device", "auto: a GPU where there is one", "auto は GPU があれば GPU", choices=("auto", "cuda", "cpu"))
    precision: str = flag(
        "auto",
        "precision",
        "autocast of the network; weights are float32 always; auto: bf16 on a GPU that computes in it, fp32 elsewhere",
        "ネットワークの autocast の精度。重みは常に float32。auto は bf16 を計算できる GPU で bf16、それ以外は fp32",
        choices=("auto", "bf16", "fp32"),
    )
    compile: bool | None = flag(
        None,
        "compile",
        "compile each block and the loss by torch.compile; the first step waits for it, a minute or so",
        "各ブロックと損失を torch.compile でコンパイルします。最初のステップは 1 分ほど待ちます",
        off="no-compile",
        shown="on with a GPU (except --generate), off on a CPU",
    )
    seed: int = flag(0, "seed", "seed of all random numbers of the run", "すべての乱数のもとになる値", bounds=NOT_NEGATIVE)
    tracker: str = flag(
        "tensorboard",
        "tracker",
        "where metrics are logged; trackio and wandb must be installed separately",
        "数値の記録先。trackio と wandb は別途インストールが必要です",
        choices=("tensorboard", "trackio", "wandb"),
    )
    tracker_project: str = flag("jit-t2i", "tracker_project", "project name in trackio or wandb", "trackio と wandb でのプロジェクト名")


@dataclass(frozen=True)
class TrainJob:
    model: Model
    diffusion: DiffusionConfig
    data: Data
    text: TextSource | None  # None for a class model
    train: Train
    averages: Averages
    save: Save
    drawing: Drawing
    evaluation: Eval | None  # None: no evaluations within training
    run: Run
    given: Mapping[str, Any] = field(default_factory=dict)  # the flags of a run that trains adapters: its base says the rest


@dataclass(frozen=True)
class DrawJob:
    """What all runs that draw with a checkpoint have in common. resume.completed takes from the checkpoint what `given` does not say."""

    model: Model
    diffusion: DiffusionConfig
    data: Data
    text: TextSource | None
    averages: Averages
    drawing: Drawing
    run: Run
    given: Mapping[str, Any]  # the flags of the command line, with their values


@dataclass(frozen=True)
class GenerateJob(DrawJob):
    prompts: tuple[str, ...]
    prompts_file: str | None


@dataclass(frozen=True)
class EvaluateJob(DrawJob):
    evaluation: Eval


@dataclass(frozen=True)
class SweepJob(DrawJob):
    evaluation: Eval
    sweep: Sweep


Job = TrainJob | GenerateJob | EvaluateJob | SweepJob


@dataclass(frozen=True)
class CacheJob:
    """cache_text.py: the store that a training command would build."""

    model: Model
    data: Data
    text: TextSource
    run: Run
    prompts: tuple[str, ...]
    prompts_file: str | None
    eval_captions: str | None


@dataclass(frozen=True)
class ReferenceJob:
    """prepare_ref.py."""

    data: Data
    img_size: int
    inception_weights: str | None
    out: str
    device: str


@dataclass(frozen=True)
class Shards(Config):
    """How prepare_data.py makes them."""

    out: str = flag("", "out", "output folder; shards that are there already are not made again", "出力フォルダ。すでにある分は作り直しません")
    image_format: str = flag(
        "jpeg",
        "image_format",
        "jpeg of quality 95 without chroma subsampling; png, or webp without loss",
        "jpeg は品質 95、色差の間引きなし。png と webp は可逆",
        choices=("jpeg", "png", "webp"),
    )
    pictures: int = flag(
        10000,
        "shard_pictures",
        "pictures per shard, where the source is not tar or Parquet files",
        "シャード 1 個あたりの枚数（元が tar や Parquet でない場合）",
        bounds=AT_LEAST_1,
    )
    min_size: int = flag(0, "min_size", "leave out pictures whose short side is smaller", "短辺がこれより小さい画像を除きます", bounds=NOT_NEGATIVE)
    duplicates: str = flag(
        "keep",
        "duplicates",
        "what to do with pictures whose file is the same as an earlier one",
        "以前の画像と同じファイルである画像の扱い",
        choices=("keep", "drop"),
    )
    engine: str = flag(
        "processes",
        "engine",
        "what makes the shards. `processes`: processes of this machine, with a share for every torchrun process or task of a Slurm array; `ray`: a Ray cluster",
        "`processes` はこのマシンのプロセス。torchrun の各プロセスや Slurm の配列ジョブの各タスクが分担します。`ray` は Ray クラスタ",
        choices=("processes", "ray"),
    )

    def check(self) -> None:
        require(self.out != "", "--out FOLDER is missing; give the folder to write to")


@dataclass(frozen=True)
class PrepareJob:
    """prepare_data.py."""

    data: Data
    img_size: int
    shards: Shards
    text: TextConfig | None  # what encodes captions; None: pictures alone
    device: str


@dataclass(frozen=True)
class FromCheckpoint(Config):
    """A program that begins with a checkpoint."""

    resume: str = flag(
        "", "resume", "checkpoint file, or folder with checkpoint-last.pth", "チェックポイントのファイル、または checkpoint-last.pth のあるフォルダ"
    )

    def check(self) -> None:
        require(self.resume != "", "--resume FOLDER_OR_FILE is missing; give the checkpoint to read")


@dataclass(frozen=True)
class ExportJob(FromCheckpoint):
    """export.py."""

    out: str = flag("", "out", "a new folder", "新しいフォルダ")
    weights: str | None = flag(None, "eval_ema", "weights to export", "書き出す重み", choices=WEIGHT_CHOICES, shown="as the checkpoint says; EMA 1 with --lora")
    lora: str | None = flag(None, "lora", "folder with adapters that are merged into the weights", "重みに足し込むアダプタのフォルダ")
    lora_scale: float = flag(1.0, "lora_scale", "scale of the adapters; 0 is the model without them", "足し込む強さ")
    dtype: str = flag("fp32", "dtype", "type of the weights", "重みの型", choices=("fp32", "bf16"))
    diffusers: bool = flag(False, "diffusers", "a folder that diffusers' DiffusionPipeline opens", "diffusers の DiffusionPipeline で開けるフォルダにします")
    with_text_encoder: bool = flag(False, "with_text_encoder", "copy the language model into the folder", "言語モデルを中にコピーします")
    llm: str | None = flag(
        None, "llm_model_name", "where the language model's folder is now", "言語モデルのフォルダの現在の場所", shown="as the checkpoint says"
    )
    licence: str = flag("other", "license", "the model card's license", "モデルカードのライセンス")
    push: str | None = flag(None, "push", "repository on the hub to upload it to", "アップロード先の Hub のリポジトリ")

    def check(self) -> None:
        super().check()
        require(self.out != "", "--out FOLDER is missing; give the folder to write to")
        check_lora(self.lora, self.lora_scale)


@dataclass(frozen=True)
class ConvertJob(FromCheckpoint):
    """convert_checkpoint.py."""

    out: str = flag("", "out", "a new file that ends in .pth", "新しいファイル（末尾は .pth）")
    parts: bool = flag(
        False,
        "parts",
        "write the tensors in parts, into a folder next to the file, as --parallel fsdp does; without this flag: one file",
        "テンソルは --parallel fsdp と同じく、隣のフォルダに書きます",
    )

    def check(self) -> None:
        super().check()
        require(self.out != "", "--out FILE is missing; give the file to write")


@dataclass(frozen=True)
class AppJob(FromCheckpoint):
    """app.py."""

    weights: str | None = flag(
        None, "eval_ema", "weights that draw", "描画に使う重み", choices=WEIGHT_CHOICES, shown="as the checkpoint says; EMA 1 with --lora"
    )
    device: str = flag("auto", "device", "auto: a GPU where there is one", "auto は GPU があれば GPU", choices=("auto", "cuda", "cpu"))
    llm: str | None = flag(
        None, "llm_model_name", "where the language model's folder is now", "言語モデルのフォルダの現在の場所", shown="as the checkpoint says"
    )
    trust_remote_code: bool = flag(
        False,
        "trust_remote_code",
        "run the Python code that the language model brings along; only for authors you trust",
        "言語モデルに同梱された Python コードを実行します。作者を信頼できる場合に限ります",
    )
    host: str = flag(
        "127.0.0.1",
        "host",
        "address that the page is served at; 0.0.0.0 lets everyone in who can reach this machine",
        "ページを公開するアドレス。0.0.0.0 にすると、このマシンに接続できる人は誰でも使えます",
    )
    port: int = flag(
        7860,
        "port",
        "port of the page; 0: any free port",
        "ページのポート。0 なら空いているポート",
        bounds=Bounds("[0, 65535]", "be in [0, 65535]", range(65536).__contains__),
    )
    lora: str | None = flag(None, "lora", "folder with adapters that are added to the weights", "重みに足すアダプタのフォルダ")
    lora_scale: float = flag(1.0, "lora_scale", "scale of the adapters; 0 is the model without them", "足す強さ")
    most_pictures: int = flag(64, "most_pictures", "largest number of pictures drawn at once", "一度に描ける枚数の上限", bounds=AT_LEAST_1)
    most_steps: int = flag(250, "most_steps", "largest number of solver steps", "ソルバーのステップ数の上限", bounds=AT_LEAST_1)

    def check(self) -> None:
        super().check()
        check_lora(self.lora, self.lora_scale)


LONG_TEXT = 256  # --max_text_len of MMJiT, as released
TEXT_FLAGS = ("llm_model_name", "max_text_len", "llm_layer", "llm_dtype", "text_norm", "text_cache", "text_cache_dir", "held_out", "missing_captions")
TEXT_FLAGS += ("eval_captions", "clip_model", "trust_remote_code", "data_format", "image_column", "caption_column", "image_root")
CONFIGS = (Model, DiffusionConfig, SamplerConfig, TextConfig, TextSource, Data, Train, Averages, Save, Drawing, Eval, Sweep, Run)


def check_kind(model: Model, given: Mapping[str, Any]) -> None:
    """Raises: UserError for a flag of text with a class model, or the other way round."""
    usual = {known.name: config_field.default for cls in CONFIGS for config_field in fields(cls) if (known := flag_of(config_field))}
    for name in ("class_num",) if model.is_text else TEXT_FLAGS:
        require(given.get(name, usual[name]) == usual[name], f"--{name} has no effect on the {'text' if model.is_text else 'class'} model {model.name}")
    require(model.is_text or not given.get("use_text_conditioning"), f"--use_text_conditioning needs a text model; try --model {model.name}-Text")


def to_plain(config: Any) -> dict[str, Any]:
    """Nested dictionaries of numbers, strings and tuples; a job's without its list of flags."""
    return {name: value for name, value in asdict(config).items() if name != "given"}


def from_plain(cls: type[C], values: Mapping[str, Any]) -> C:
    """Back from `to_plain`; fields that are not there have their defaults, and unknown ones, of a later version, are passed over.

    Raises: UserError for a value of another type, or one that cannot work.
    """
    hints, found = typing.get_type_hints(cls), {}
    for config_field in fields(cls):
        if config_field.name in values:
            found[config_field.name] = as_type(hints[config_field.name], values[config_field.name], config_field.name)
    return cls(**found)


def as_type(hint: Any, value: Any, name: str) -> Any:
    """The value as a field of that type holds it.  Raises: UserError where it is of another."""
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_plain(hint, value)
    if isinstance(hint, types.UnionType):
        inner, *_ = (kind for kind in typing.get_args(hint) if kind is not type(None))
        return None if value is None else as_type(inner, value, name)
    if typing.get_origin(hint) is tuple:
        kinds, wanted = typing.get_args(hint), f"{name} {value!r}: wanted {hint}"
        require(isinstance(value, tuple | list), wanted)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        require(len(kinds) == len(value), wanted)
        return tuple(as_type(kind, one, name) for kind, one in zip(kinds, value))
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{name} {value!r}: wanted {getattr(hint, '__name__', hint)}")
    return value


def settings(cls: type, path: str = "") -> Iterator[tuple[str, Field, Any]]:
    """The fields of a config and of those within it: dotted path ('encoder.llm'), field, type."""
    hints = typing.get_type_hints(cls)
    for config_field in fields(cls):
        hint = hints[config_field.name]
        if is_dataclass(hint):
            yield from settings(hint, f"{path}{config_field.name}.")
        else:
            yield path + config_field.name, config_field, hint
