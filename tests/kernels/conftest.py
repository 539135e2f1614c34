"""Kernels run on the CPU here: the interpreter has to be chosen before triton is imported, which no test module does on its own."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
