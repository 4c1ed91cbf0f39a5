"""Train, sample and evaluate JiT on captions or class labels: `torchrun ... main_jit.py --help`, or plain `python` for one process.

argv -> Job -> train, evaluate, sweep or generate; the epoch loop.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import flags
from util.errors import UserError, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse()  # a wrong flag is told before torch is imported, which takes seconds

import engine_jit as engine
import resume
import sampling
from config import EvaluateJob, GenerateJob, Job, SweepJob, TrainJob
from datasets.source import batches_of
from evaluation.evaluator import call_out_initial
from evaluation.records import describe
from evaluation.sweep import run_sweep
from prepare import TrainingRun, begin, prepare_evaluation, prepare_generation, prepare_training
from util import distributed as dist
from util.files import Lock, read_lines, writable_folder
from util.logging import close_bars, say
from util.stopping import Stop
from util.trackers import Board
from util.workers import loader_deaths


def train(job: TrainJob) -> None:
    """Begin a run, or go on with it."""
    job = resume.on_its_base(job)
    lock = Lock(writable_folder(job.run.output_dir, "--output_dir"), "--output_dir") if os.environ.get("RANK", "0") == "0" else None  # no group is joined yet
    saved = resume.find(job)
    if saved:
        resume.check(saved, job)
        job = resume.begun_with(job, saved)
    stop = Stop()
    try:
        with stop.at_once(lambda: leave_early(stop)):
            prepared = prepare_training(job, saved)
        train_epochs(job, begin(job, prepared, stop))
    finally:
        stop.close()
        if lock:
            lock.free()


def train_epochs(job: TrainJob, run: TrainingRun) -> None:
    """The epoch loop, with the evaluations between epochs.  Collective."""
    training, progress, epochs = run.training, run.progress, job.train.epochs
    if progress.epoch >= epochs:
        say(f"nothing to train: {progress.epoch} of --epochs {epochs} epochs are done")
    try:
        owed = run.online and progress.evaluation_due and progress.epoch and not run.online.made(training.state.step)
        left = range(progress.epoch, epochs)
        if owed and not evaluate_online(run, job):
            finish(run, job)
            left = range(0)
        with closing(batches_of(training.loader)) as batches, loader_deaths():
            for epoch in left:
                with dist.patience(dist.IN_STEPS):
                    due = engine.train_one_epoch(training, batches, epoch, progress.epoch_step if epoch == progress.epoch else 0)
                if due.stop or (due.evaluate and not evaluate_online(run, job)):
                    finish(run, job)
                    break
        run.writer.close()
    except Exception:  # whatever it is, a checkpoint that is being written is still good
        close_bars()
        with suppress(UserError):
            run.writer.wait()
        raise
    training.report.bar.close()
    training.report.board.close()
    dist.barrier()  # rank 0 may have been writing


def evaluate_online(run: TrainingRun, job: TrainJob) -> bool:
    """Run the evaluation that is due.  Returns: False, with nothing run, if a signal to stop came first.

    A signal during it ends the process; the next start repeats it.  Collective.
    """
    training = run.training
    if training.stop.agreed_now():
        return False
    with training.stop.at_once(lambda: leave_saved(run, job)):
        run.online(training.state, training.report.board)
    return True


def finish(run: TrainingRun, job: TrainJob) -> None:
    """All is saved: wait for what is being written, and say how to go on."""
    run.writer.close()
    why = f"stopped by {run.training.stop.name or 'a signal to another process'} after step {run.training.state.step}"
    say(f"{why}; to continue, run the same command with --resume {job.run.output_dir}")


def leave_saved(run: TrainingRun, job: TrainJob) -> None:
    finish(run, job)
    run.training.report.board.close()
    end_at_once()


def leave_early(stop: Stop) -> None:
    say(f"stopped by {stop.name} before training began")
    end_at_once()


def end_at_once() -> None:
    sys.stdout.flush()
    os._exit(0)


def generate(job: GenerateJob) -> None:
    """Draw prompts into output_dir/samples/."""
    asked = read_lines(job.prompts_file, "--prompts_file") if job.prompts_file else job.prompts
    job, saved = resume.open_for_drawing(job)
    prompts = sampling.as_prompts(job.model, asked or None, engine.test_prompts)
    path, which = saved.path, job.drawing.weights
    studio = prepare_generation(job, saved, prompts)
    weights, painter = studio.weights, studio.painter
    more = f" and {job.drawing.lora} x {job.drawing.lora_scale:g}" if job.drawing.lora else ""
    say(f"drawing {len(prompts)} prompts with {path}{more} [{describe(which, weights.step, painter.sampler, painter.seed)}]")
    call_out_initial(weights, which)
    with weights.drawing(which):
        sheet = sampling.generate(painter, studio.conditioning.prompts, prompts, Path(job.run.output_dir) / "samples")
    say(f"pictures in {sheet.parent}, all of them on {sheet}")


def evaluate(job: EvaluateJob | SweepJob) -> None:
    """Once, or under all settings of a sweep; the figures go to TensorBoard too."""
    job, saved = resume.open_for_drawing(job)
    path = saved.path
    evaluator = prepare_evaluation(job, saved)  # closes the checkpoint
    step, count, which = evaluator.state.step, job.evaluation.num_images, job.drawing.weights
    say(f"evaluating {path}, step {step}")
    with evaluator.on_device():
        if isinstance(job, SweepJob):
            records = run_sweep(evaluator, job.sweep, count)
        else:
            call_out_initial(evaluator.state, which)
            records = [evaluator(which, job.drawing.sampler, count)]
    board = Board(job.run, {})
    for record in records:
        board.scalars(record.scalars(), step)
    board.close()


def run(job: Job) -> None:
    """Raises: UserError, in one line, for what a user can put right."""
    match job:
        case TrainJob():
            train(job)
        case GenerateJob():
            generate(job)
        case EvaluateJob() | SweepJob():
            evaluate(job)


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line(), dist.lost_ranks():
        run(flags.parse(argv))
    dist.shutdown()


if __name__ == "__main__":
    main()
