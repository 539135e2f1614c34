"""C++ and CUDA sources, installed as `fastkd.csrc` so that they can be compiled where they are used."""
