"""Peak memory of forward and backward, measured in a fresh process: one chunk of logits, never all of them."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, torch, fastkd
torch.manual_seed(0)
N, V, HS, HT = 4096, 30522, 384, 768
student, head = torch.randn(N, HS, requires_grad=True), torch.randn(V, HS).mul_(0.05).requires_grad_()
teacher, teacher_head = torch.randn(N, HT), torch.randn(V, HT).mul_(0.05)
small = fastkd.linear_kl_div(student[:64], head, teacher[:64], teacher_head)   # thread pools and GEMM workspaces exist from here on
torch.autograd.grad(small, [student, head]); del small
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resident = int(open("/proc/self/statm").read().split()[1]) * 4
loss = fastkd.linear_kl_div(student, head, teacher, teacher_head)
loss.backward()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gradients = (student.grad.numel() + head.grad.numel()) * 4 / 1024
print((peak - resident - gradients) / 1024)
"""


def test_peak_above_inputs_and_gradients():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    megabytes = float(done.stdout)
    assert megabytes < 200, f"{megabytes:.0f} MB above inputs and gradients (all logits at once would take about 3300)"
    assert megabytes > 100, f"{megabytes:.0f} MB is less than one chunk of logits: the measurement is broken"
