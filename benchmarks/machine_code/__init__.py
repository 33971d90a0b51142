"""What the Triton kernels cost on a GPU that is not here: a model, from the machine code that is made for it.

`ahead_of_time` records what the launchers would launch and compiles it; `sass` counts instructions in and outside of
loops; `traffic` says what each kernel reads, writes and multiplies; `model` makes times of these for a `Chip`.
`python -m benchmarks.machine_code` does it for the calls that matter.
"""
