"""Triton kernels, and nothing else; mosa_fast.ops launches them. Only what imports this imports Triton."""
