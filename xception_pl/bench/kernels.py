"""`bench kernels`: what the compiler makes of the fused kernels for a GPU that need not be there, and the bytes they move."""

import argparse
import os
import sys


def main(arguments: list[str]) -> int:
    """Prints the table; exit status 1 where a kernel spills registers."""
    parser = argparse.ArgumentParser(
        prog="python -m xception_pl.bench kernels",
        description="Compiles the kernels of a fused training step of the paper's network for a GPU that need not be there.",
    )
    parser.add_argument(
        "--target", default="sm_90", metavar="SM", help="sm_80, sm_90 … (default: %(default)s, an H100)"
    )
    parser.add_argument("--batch", type=int, default=256, help="images a step (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--bytes", action="store_true", help="count bytes alone, compile nothing")
    options = parser.parse_args(arguments)
    number = options.target.removeprefix("sm_")
    if not number.isdecimal() or options.batch < 1:
        print("--target is a name such as sm_90, and --batch at least 1.", file=sys.stderr)
        return 2
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("0", ""):
        print("note: TRITON_INTERPRET is ignored: the interpreter compiles nothing", file=sys.stderr)

    import torch

    try:
        from xception_pl.kernels import offline
    except ImportError as error:
        print(f"triton is not installed: {error}", file=sys.stderr)
        return 2
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.precision]
    step = offline.record(options.batch, dtype=dtype)
    moved: dict[str, tuple[int, int]] = {}
    for launch in step.launches:
        count, size = moved.get(launch.name, (0, 0))
        moved[launch.name] = (count + 1, size + launch.bytes)
    print("| kernel | launches a step | MB an image |\n|---|---|---|")
    for name, (count, size) in sorted(moved.items(), key=lambda item: -item[1][1]):
        print(f"| {name} | {count} | {size / options.batch / 1e6:.1f} |")
    print(f"| **all** | {len(step.launches)} | {step.bytes_an_image / 1e6:.1f} |", flush=True)
    return 0 if options.bytes else _compile(step, int(number))


def _compile(step: "offline.Step", capability: int) -> int:  # type: ignore[name-defined]  # noqa: F821
    from xception_pl.kernels import offline

    print(
        "\n| kernel | channels | flags | tile | programs | registers | spilled bytes | shared KB | HGMMA | widest access |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    spilling = 0
    for launch in offline.different(step):
        report = offline.compile_for(launch, capability)
        spilling += report.spilled > 0
        cells = (
            launch.name, launch.shape, launch.flags, launch.tile, f"{launch.programs:,}", report.registers, report.spilled,
            f"{report.shared / 1024:.0f}", report.products, report.wide,
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"\n{spilling} of these kernels spill registers." if spilling else "\nNo kernel spills registers.")
    return int(spilling > 0)
