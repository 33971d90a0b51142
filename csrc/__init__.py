"""CUDA C++ sources of the fallback for Triton."""
