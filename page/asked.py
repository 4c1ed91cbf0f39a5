"""What a visitor asks for: values that a browser, or anything else, has sent, to the parts of a drawing.  No gradio here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from config import Model, SamplerConfig, as_type, from_plain
from sampling import as_prompts
from util.errors import UserError

LONGEST = 2000  # characters of a prompt
LARGEST = 2**53 - 1  # of the whole numbers that a browser holds exactly
HOLE = "{}"  # where a word goes
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rules:
    """What may be asked for."""

    model: Model
    most_pictures: int
    most_steps: int


@dataclass(frozen=True)
class Part:
    """What is painted together, and so appears together: picture `first` + i is of prompt i."""

    prompts: Sequence[str] | Sequence[int]
    sampler: SamplerConfig
    first: int
    notes: Sequence[str]  # what stands under each


@dataclass(frozen=True)
class Order:
    """A drawing."""

    seed: int
    parts: Sequence[Part]

    @property
    def count(self) -> int:
        return sum(len(part.prompts) for part in self.parts)


def pictures(values: Values, rules: Rules) -> Order:
    """Every prompt, and all of them again: the k-th time, prompt j of n is picture k n + j, as if --generate had the list k + 1 times.

    A part is one time, so the first is what --generate draws of the list.  Raises: UserError, like the others.
    """
    prompts = prompts_of(values["prompts"], rules)
    times = whole(values["times"], "回数 / times", 1, rules.most_pictures)
    check_count(len(prompts) * times, rules)
    sampler, count = sampler_of(values, rules), len(prompts)
    return Order(seed_of(values), [Part(prompts, sampler, k * count, [f"{k * count + j}: {one}" for j, one in enumerate(prompts)]) for k in range(times)])


def over_cfg(values: Values, rules: Rules) -> Order:
    """One picture at several cfg."""
    prompts, number = one_prompt(values["prompt"], rules), number_of(values)
    scales = [as_number(part) for part in listed(values["scales"], "cfg")]
    check_count(len(scales), rules)
    samplers = [sampler_of({**values, "cfg": scale}, rules) for scale in scales]
    return Order(seed_of(values), [Part(prompts, sampler, number, [f"cfg {sampler.cfg_scale:g}"]) for sampler in samplers])


def over_words(values: Values, rules: Rules) -> Order:
    """One picture in whose prompt a word changes."""
    (template,), number, sampler = one_prompt(values["template"], rules), number_of(values), sampler_of(values, rules)
    if template.count(HOLE) != 1:
        raise UserError(f"語の入る場所を {HOLE} と 1 か所だけ書いてください / write {HOLE} once, where the word goes")
    words = listed(values["words"], "語 / words")
    check_count(len(words), rules)
    prompts = [one_prompt(template.replace(HOLE, word), rules) for word in words]
    return Order(seed_of(values), [Part(prompt, sampler, number, [word]) for prompt, word in zip(prompts, words)])


def check_count(count: int, rules: Rules) -> None:
    if count > rules.most_pictures:
        raise UserError(
            f"一度に描けるのは {rules.most_pictures} 枚までです（今は {count} 枚）/ at most {rules.most_pictures} pictures at once; these are {count}"
        )


def prompts_of(value: Any, rules: Rules) -> list[str] | list[int]:
    """The lines that hold text, or the labels of a class model."""
    if rules.model.is_text:
        text = text_of(value, "プロンプト / prompt", (LONGEST + 1) * rules.most_pictures)
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if too_long := [line for line in prompts if len(line) > LONGEST]:
            raise UserError(f"1 行は {LONGEST} 文字までです（{len(too_long[0])} 文字の行があります）/ at most {LONGEST} characters a line")
    else:
        labels = value if isinstance(value, list) else [value] * (value is not None)
        try:
            prompts = as_prompts(rules.model, [text_of(label, "ラベル / label", 20) for label in labels], ())
        except UserError as error:
            raise in_words_of_the_page(error) from error
    if not prompts:
        raise UserError("何を描くかを入力してください / say what to draw")
    check_count(len(prompts), rules)
    return prompts


def one_prompt(value: Any, rules: Rules) -> list[str] | list[int]:
    prompts = prompts_of(value, rules)
    if len(prompts) > 1:
        raise UserError("ここには 1 行だけ書いてください / one line only, here")
    return prompts


def sampler_of(values: Values, rules: Rules) -> SamplerConfig:
    steps = whole(values["steps"], "ステップ数 / steps", 1, rules.most_steps)
    interval = (values["interval_min"], values["interval_max"])
    try:
        found = from_plain(SamplerConfig, {"method": values["method"], "steps": steps, "cfg_interval": interval, "time_shift": values["time_shift"]})
        return replace(found, cfg_scale=as_type(float, values["cfg"], "cfg"))
    except UserError as error:
        raise in_words_of_the_page(error) from error


def in_words_of_the_page(error: UserError) -> UserError:
    """There are no flags on it."""
    return UserError(f"この設定では描けません / this cannot be drawn: {str(error).replace('--', '')[:200]}")


def seed_of(values: Values) -> int:
    return whole(values["seed"], "シード / seed", 0, LARGEST)


def number_of(values: Values) -> int:
    return whole(values["number"], "絵の番号 / picture number", 0, LARGEST)


def whole(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name}: {low} から {high} までの整数にしてください / wanted a whole number from {low} to {high}")
    return value


def text_of(value: Any, name: str, longest: int) -> str:
    """Raises: UserError for what is no text, too much of it, or has no form in UTF-8 (half a character)."""
    if not isinstance(value, str) or len(value) > longest or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{name}: {longest} 文字までの文字列にしてください / wanted text of at most {longest} characters")
    return value


def listed(value: Any, name: str) -> list[str]:
    """The parts of a text between commas, Japanese ones too, or lines."""
    text = text_of(value, name, LONGEST)
    parts = [part.strip() for part in text.translate(str.maketrans("、，\n", ",,,")).split(",") if part.strip()]
    if not parts:
        raise UserError(f"{name}: 1 つ以上、コンマで区切って書いてください / write one or more, separated by commas")
    return parts


def as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"cfg は 1, 2, 3.5 のような数で書いてください / wanted numbers like 1, 2, 3.5; found {text[:20]}") from None
