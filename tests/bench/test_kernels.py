"""`bench kernels` and `bench tune` where there is no GPU: the compiler's report, the counted bytes, the refusals."""

import os
import subprocess
import sys

import pytest
import torch


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here the kernels are the interpreter's."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "xception_pl.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, env=env)


def test_bytes_of_a_step() -> None:
    """The bytes of the middle flow's depthwise convolution are its input, its output and its weight, 26 times over."""
    code = (
        "from xception_pl.kernels import offline; step = offline.record(4)\n"
        "found = [one for one in step.launches if one.name == 'depthwise' and one.arguments['channels'] == 728]\n"
        "middle = [one for one in found if one.arguments['x'].shape[1] == 19]\n"
        "for one in middle: print(one.bytes)\n"
        "print(round(step.bytes_an_image / 1e6))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    *sizes, total = map(int, done.stdout.split())
    assert len(sizes) == 26, done.stderr
    least = 2 * 4 * 19 * 19 * 728 * 2
    assert all(least <= size < least + 60_000 for size in sizes)
    assert 600 < total < 800  # in so small a batch the weights weigh


def test_tune_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = bench("tune")
    assert done.returncode == 2
    assert done.stderr == "tune needs a GPU, and this machine has none.\n"


@pytest.mark.slow
def test_no_kernel_spills_on_hopper() -> None:
    """The kernels with the most registers, compiled for sm_90: Hopper's matrix instructions, wide accesses, no spills."""
    code = (
        "from xception_pl.kernels import offline; step = offline.record(256); seen = set()\n"
        "for one in offline.different(step):\n"
        "    if one.name in seen or '728' not in one.shape: continue\n"
        "    seen.add(one.name); made = offline.compile_for(one, 90)\n"
        "    print(one.name, made.spilled, made.products > 0, made.wide >= 8)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=580, env=env)
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    big = (
        "pointwise",
        "pointwise_input",
        "pointwise_weight",
        "depthwise",
        "depthwise_backward",
        "pool",
        "pool_backward",
    )
    assert {name: rows.get(name) for name in big} == {
        name: ["0", str(name.startswith("pointwise")), "True"] for name in big
    }, done.stderr
