"""Many runs as one table: what `mosa_fast.sweep` is made of."""
