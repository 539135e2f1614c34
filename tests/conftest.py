"""Kernels run on the CPU here: the interpreter has to be chosen before anything imports triton, as transformers may."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
