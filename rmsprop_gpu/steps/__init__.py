"""What a step needs and what runs it: the plan, its batches, and the loops that take steps on host and device.

`state`, `optimizer` and `profiling` may import it. A plan makes batches and runs its steps where its arrays are stored.
"""
