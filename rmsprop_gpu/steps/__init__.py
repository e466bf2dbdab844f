"""What a step needs and who runs it: the plan, its batches, and the loops of host and device that take the steps.

`state`, `optimizer` and `profiling` may import it. A plan makes batches and runs its steps where its arrays lie.
"""
