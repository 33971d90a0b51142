"""Triton kernels and their launchers; nothing else imports Triton."""
