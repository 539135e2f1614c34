"""Peak memory of forward and backward, measured in a fresh process: one chunk of logits, never all of them."""

from __future__ import annotations

import subprocess
import sys

from fastkd.ops.plan import plan_chunks

PROGRAM = """
import torch, fastkd
torch.manual_seed(0)
N, V, HS, HT = 4096, 30522, 384, 768
student, head = torch.randn(N, HS, requires_grad=True), torch.randn(V, HS).mul_(0.05).requires_grad_()
teacher, teacher_head = torch.randn(N, HT), torch.randn(V, HT).mul_(0.05)
small = fastkd.linear_kl_div(student[:64], head, teacher[:64], teacher_head)   # thread pools and GEMM workspaces exist from here on
torch.autograd.grad(small, [student, head]); del small
resident = int(open("/proc/self/statm").read().split()[1]) * 4
open("/proc/self/clear_refs", "w").write("5")   # the peak counts from here
loss = fastkd.linear_kl_div(student, head, teacher, teacher_head)
loss.backward()
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
gradients = (student.grad.numel() + head.grad.numel()) * 4 / 1024
print((peak - resident - gradients) / 1024)
"""


def test_peak_above_inputs_and_gradients_is_what_the_plan_says():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    megabytes, planned = float(done.stdout), plan_chunks(4096, 30_522).buffer_bytes / 2**20
    assert planned * 0.9 < megabytes < planned * 1.05 + 20, f"{megabytes:.0f} MiB above inputs and gradients, planned {planned:.0f}"
    assert megabytes * 2**20 < 200e6
