"""Who competes, on either device, in the order of the tables."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import contenders_cpu as cpu
from benchmarks import contenders_cuda as cuda
from benchmarks import contenders_jax as jax
from benchmarks import contenders_torch as torch
from benchmarks.contenders_base import Contender
from benchmarks.workloads import AGAIN, C_OPENMP, COPY, OURS, TORCH

ON_CPU = (
    *(cpu.RMSPROP_GPU, replace(cpu.RMSPROP_GPU, name=AGAIN)),  # the same once more: its ratio to the first is the noise
    *(cpu.TOGETHER, cpu.ASSIGNING, cpu.UNCLIPPED, *cpu.STORED, cpu.NUMPY, cpu.NUMEXPR),
    *(torch.OURS_IN_TORCH, torch.FOREACH, torch.FOR_LOOP, torch.COMPILE, torch.ADAGRAD),
    *(torch.IN_32_BITS, torch.IN_8_BITS),
    *(jax.OPTAX_RMSPROP, jax.KERAS),
    *(cpu.C_LOOP, cpu.C_COPY),
)
ON_CUDA = (
    *(cuda.RMSPROP_GPU, replace(cuda.RMSPROP_GPU, name=AGAIN)),
    *(*cuda.STORED, cuda.FUSE, cuda.ELEMENTWISE),
    *map(torch.on_cuda, (torch.FOREACH, torch.COMPILE, torch.ADAGRAD)),
    cuda.DEVICE_COPY,
)
CONTENDERS: dict[str, dict[str, Contender]] = {
    "cpu": {contender.name: contender for contender in ON_CPU},
    "cuda": {contender.name: contender for contender in ON_CUDA},
}
SCALING = (OURS, *TORCH, C_OPENMP, COPY)  # measured with fewer threads too, on the CPU
