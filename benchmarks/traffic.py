"""Counted, not measured: what a training step computes, moves and keeps: `python -m benchmarks.traffic MODEL:PIXELS:BATCH ...`, of any size on any machine.

Tensors hold nothing (FakeTensorMode; for the compiler, memory that is never touched). Eager: bytes of the inputs and outputs of every operator that is no view.
Compiled: of every kernel that Inductor would make for this device of the blocks and the loss (its own count, before any code is made), and the rest in eager.
Kept: what the forward pass saves for the backward pass, each storage once, parameters not counted.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import engine_jit as engine
from benchmarks.speed import Case, parse
from benchmarks.train_step import CPU, Step, Work, flops_of
from denoiser import v_loss
from util.errors import told_in_one_line
from util.parallel import in_precision

CARDS = (24, 40, 80, 141)  # GB
STATE = 24  # bytes a parameter: it, AdamW's two moments, two averages, its gradient; all float32
LESS = 0.95  # of a card is there for tensors
PRODUCTS, BANDWIDTH = 600e12, 3.0e12  # FLOP/s in bf16 and bytes/s of an H100: with them the count of eager steps is within a tenth of the measured ones
SEEN = 100e6  # pictures that the table of costs is for


# --- eager


class Moved(TorchDispatchMode):
    """Bytes and calls of each operator that moves something."""

    FREE = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.detach", "aten.alias", "aten.lift", "prim.device")

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        name = str(operator)
        if not operator.is_view and not name.startswith(self.FREE):
            self.bytes[name] += sum(bytes_of(leaf) for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor))
            self.calls[name] += 1
        return made


def bytes_of(tensor: Tensor) -> int:
    """What it holds, where it is expanded once."""
    return tensor.element_size() * prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)


@contextmanager
def kept(*without: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that is saved for the backward pass inside, but for the modules' own."""
    own, found = {param.untyped_storage()._cdata for module in without for param in module.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@dataclass
class Count:
    """In bytes.  dearest: the operators or kernels that move the most."""

    forward: int = 0
    backward: int = 0
    saved: int = 0
    update: int = 0
    operators: int = 0
    dearest: Counter = field(default_factory=Counter)

    @property
    def moved(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Count") -> "Count":
        return Count(self.forward + other.forward, self.backward + other.backward, self.saved + other.saved, self.update, self.operators + other.operators)

    def __mul__(self, times: int) -> "Count":
        return Count(times * self.forward, times * self.backward, times * self.saved, self.update, times * self.operators)


def count(function: Callable, inputs: tuple, *modules: nn.Module) -> Count:
    """Forward and backward of function(*inputs) in eager."""
    with Moved() as there, kept(*modules) as saved:
        made = [out for out in tree_leaves(function(*inputs)) if isinstance(out, Tensor) and out.requires_grad]
    gradients = [torch.empty_like(out) for out in made]
    with Moved() as back:
        torch.autograd.backward(made, gradients)
    operators = there.calls.total() + back.calls.total()
    return Count(there.bytes.total(), back.bytes.total(), sum(saved.values()), 0, operators, there.bytes + back.bytes)


def count_step(case: Case, bf16: bool, **how: bool) -> Count:
    work = Work(case, CPU, bf16)
    step = Step(work, work.state(), **how)
    found = count(lambda: step.loss(), (), work.net)
    with Moved() as update:
        engine.take_step(step.state, None, step.skips)
    found.update, found.operators = update.bytes.total(), found.operators + update.calls.total()
    return found


# --- compiled


class Lowered(Exception):
    pass


class Lowering:
    """A backend of torch.compile that makes no code: its functions return memory that nothing has touched."""

    def __init__(self):
        self.count = Count()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_fx(graph, inputs, inner_compile=self.lower)

    def lower(self, graph: torch.fx.GraphModule, inputs: list, is_backward: bool = False, **options) -> Callable:
        def leave(lowering: GraphLowering) -> None:
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                size = node.get_read_write_buffers_sizes()
                self.count.forward, self.count.backward = self.count.forward + size * (not is_backward), self.count.backward + size * is_backward
                self.count.operators += size > 0
                origins = sorted({str(origin) for part in node.get_nodes() for origin in getattr(part.node, "origins", ())})
                self.count.dearest[f"{'backward' if is_backward else 'forward'}: {', '.join(origins)}"] += size
            raise Lowered

        try:
            with mock.patch.object(GraphLowering, "compile_to_module", leave):
                compile_fx_inner(graph, inputs, is_backward=is_backward, **options)
        except InductorError as error:
            if not isinstance(error.inner_exception, Lowered):
                raise
        (output,) = graph.graph.find_nodes(op="output")
        made = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in output.args[0]]

        def call(arguments: list) -> list:
            arguments.clear()
            return [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device) if isinstance(one, Tensor) else one for one in made]

        call._boxed_call = True
        return call


def count_compiled(function: Callable, inputs: tuple, bf16: bool, device: torch.device, *modules: nn.Module) -> Count:
    """Forward and backward of function(*inputs), compiled.  inputs: fake ones, for their shapes."""

    def like(leaf):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=device).requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    torch._dynamo.reset()
    lowering, inputs = Lowering(), tree_map(like, inputs)
    with inductor.patch(force_disable_caches=True), kept(*modules) as saved:
        made = in_precision(torch.compile(function, fullgraph=True, dynamic=False, backend=lowering), device, bf16)(*inputs)
    made = [out for out in tree_leaves(made) if out.requires_grad]
    with inductor.patch(force_disable_caches=True):
        torch.autograd.backward(made, [torch.empty_like(out) for out in made])
    lowering.count.saved = sum(saved.values())
    return lowering.count


# --- a step


@dataclass
class Part:
    """A block, or the loss, and how often it is called."""

    function: Callable
    inputs: tuple  # fake
    number: int | None  # of the block
    times: int = 0


def parts_of(work: Work, case: Case) -> list[Part]:
    """Blocks of one shape are one part."""
    found: dict[str, Part] = {}

    def note(number: int, block: nn.Module, inputs: tuple) -> None:
        key = repr((block, tree_map(lambda leaf: (tuple(leaf.shape), leaf.dtype), inputs)))
        fresh = tree_map(lambda leaf: torch.empty_like(leaf).requires_grad_(leaf.requires_grad), inputs)
        found.setdefault(key, Part(block, fresh, number)).times += 1

    hooks = [block.register_forward_pre_hook(partial(note, number)) for number, block in enumerate(work.net.repeated)]
    z_t, t = torch.randn(case.batch, 3, case.pixels, case.pixels), torch.rand(case.batch)
    x_pred = in_precision(work.net, CPU, work.bf16)(z_t, t, work.batch.y)
    for hook in hooks:
        hook.remove()
    loss = Part(v_loss, (torch.empty_like(x_pred).requires_grad_(), z_t, z_t, t, 0.05), None, 1)
    return [*found.values(), loss]


@dataclass(frozen=True)
class Counted:
    case: Case
    parameters: int
    flops: int  # of a step
    counts: dict[str, Count]
    block: int  # bytes that the largest block saves, compiled

    def fits(self, way: str, card: int, bf16: bool) -> int:
        """Pictures whose activations a card of so many GB holds besides the state."""
        again = "checkpointing" in way
        once = 2 * self.parameters * (bf16 and not again)  # weights as bf16, which autocast keeps
        each = (self.counts[way].saved + self.block * again - once) / self.case.batch
        return max(0, int((LESS * card * 1e9 - STATE * self.parameters - once) / each))


def count_case(case: Case, bf16: bool, device: torch.device) -> Counted:
    with FakeTensorMode():
        counts = {
            "baseline": count_step(case, bf16, published=True),
            "eager": count_step(case, bf16),
            "eager, checkpointing": count_step(case, bf16, checkpointing=True),
        }
        work = Work(case, CPU, bf16)
        parts = parts_of(work, case)
        eager = [count(in_precision(part.function, CPU, bf16), part.inputs, work.net) for part in parts]
    with torch.device("meta"):
        empty = case.build()
    whole, again, block = counts["eager"], counts["eager, checkpointing"], 0
    found, found_again = whole, again
    for part, before in zip(parts, eager):
        module = None if part.number is None else empty.repeated[part.number].to_empty(device=device)
        after = count_compiled(module or part.function, part.inputs, bf16, device, *([module] if module else []))
        print_dearest(f"{part.times} x {type(module).__name__ if module else 'loss'}, compiled", after)
        found += (after + before * -1) * part.times
        twice = Count(0, after.forward - before.forward) if module else Count()
        found_again += (after + before * -1 + twice + Count(saved=(before.saved - after.saved) if module else 0)) * part.times
        block = max(block, after.saved) if module else block
    counts |= {"compiled": found, "compiled, checkpointing": found_again}
    return Counted(case, sum(param.numel() for param in work.net.parameters()), flops_of(case), counts, block)


# --- what is told


def print_dearest(name: str, found: Count) -> None:
    print(f"\n{name}: {found.forward / 1e9:.2f} GB forward, {found.backward / 1e9:.2f} GB backward, {found.saved / 1e9:.2f} GB kept; the dearest:")
    for key, size in found.dearest.most_common(12):
        print(f"    {size / 1e9:8.2f} GB  {key[:150]}", flush=True)


def print_traffic(counted: Counted, bf16: bool) -> None:
    case = counted.case
    print(f"\n`{case}`, {'bf16' if bf16 else 'fp32'}, {counted.flops / 1e12:.3g} TFLOP a step, {counted.parameters / 1e6:.0f}M parameters; computed\n")
    print(
        "| setting | operators, kernels of ours included | GB forward | GB backward | GB both | GB optimizer and averages | GB kept |\n|---|---|---|---|---|---|---|"
    )
    for way, found in counted.counts.items():
        sizes = (found.forward, found.backward, found.moved, found.update, found.saved)
        print(f"| {way} | {found.operators} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |")
    print_dearest("eager", counted.counts["eager"])


def print_memory(all_counted: list[Counted], bf16: bool) -> None:
    ways = ("eager", "compiled", "compiled, checkpointing")
    cells = [*(f"GB kept, {way}" for way in ways), *(f"pictures on {card} GB" for card in CARDS)]
    print(f"\n| network | pixels | batch | parameters | GB of state | {' | '.join(cells)} |\n|{'---|' * (5 + len(cells))}")
    for counted in all_counted:
        case, kept_by = counted.case, [f"{counted.counts[way].saved / 1e9:.1f}" for way in ways]
        held = [" / ".join(str(counted.fits(way, card, bf16)) for way in ways) for card in CARDS]
        start = [f"`{case.model}`", str(case.pixels), str(case.batch), f"{counted.parameters / 1e6:.0f}M", f"{STATE * counted.parameters / 1e9:.1f}"]
        print(f"| {' | '.join([*start, *kept_by, *held])} |")


def print_cost(all_counted: list[Counted]) -> None:
    """Hours for SEEN pictures, if products and traffic take the time that an H100 needs for each, one after the other."""
    print(f"\n| network | pixels | batch | GFLOP a picture | hours eager, one GPU | hours compiled, one GPU | eight |\n|{'---|' * 7}")
    for counted in all_counted:
        case, steps = counted.case, SEEN / counted.case.batch / 3600
        eager, compiled = (
            steps * (counted.flops / PRODUCTS + (counted.counts[way].moved + counted.counts[way].update) / BANDWIDTH) for way in ("eager", "compiled")
        )
        print(f"| `{case.model}` | {case.pixels} | {case.batch} | {counted.flops / case.batch / 1e9:.0f} | {eager:.0f} | {compiled:.0f} | {compiled / 8:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="MODEL:PIXELS:BATCH")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels are counted; those of a GPU need one")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    bf16 = args.precision == "bf16"
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)  # it tells where we leave it
    with told_in_one_line():
        cases = [parse(case) for case in args.cases]
    found = []
    for case in cases:
        found.append(count_case(case, bf16, torch.device(args.device)))
        print_traffic(found[-1], bf16)
    print_memory(found, bf16)
    print_cost(found)


if __name__ == "__main__":
    main()
