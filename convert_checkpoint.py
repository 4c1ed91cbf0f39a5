"""One checkpoint, two forms: `python convert_checkpoint.py --resume output/g16 --out g16.pth` makes the one file of one in parts, and `--parts` the parts of a file.

Both hold the same and resume the same; a run takes either, however many its processes are.
"""

from collections.abc import Sequence
from pathlib import Path

import flags
from util.errors import UserError, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse_convert()  # before torch is imported

import resume
from config import ConvertJob
from util import checkpoint
from util.files import writable_folder
from util.logging import say
from util.parts import SECTIONS, flat, nested
from util.parts_writer import write_parts
from util.sharding import whole


def convert(job: ConvertJob) -> None:
    """Raises: UserError where it cannot be read or written."""
    path, out = checkpoint.find(job.resume), Path(job.out)
    if path.is_dir():
        raise UserError(f"--resume {job.resume} is a model for drawing; wanted a training checkpoint")
    if out.exists() or out.suffix != ".pth":
        raise UserError(f"--out {out}{' is there already' if out.exists() else ''}; wanted a new name that ends in .pth")
    writable_folder(out.parent, "--out")
    state = checkpoint.load(path)
    state.pop("parts", None)
    if "job" not in state:  # a published file: its `args` say which model it is
        state["job"] = resume.read(path).job
    state.pop("args")
    if "param_groups" in state.get("optimizer", {}):
        del state["optimizer"]
        say(f"{path}: its optimizer state is not by name (a published file?), so no run could go on with it; it is left out")
    try:
        state |= nested({name: whole(value) for name, value in flat({name: state[name] for name in SECTIONS if name in state})})
        write_parts(state, out) if job.parts else checkpoint.save(out, state)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error})") from error
    say(f"{path} is in {'parts' if job.parts else 'one file'} now: {out}")


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line():
        convert(flags.parse_convert(argv))


if __name__ == "__main__":
    main()
