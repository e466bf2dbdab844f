"""What a step needs and who runs it: the plan, its batches, and the loops of host and device that take the steps.

It may import `hyper`, `kernels` and `arrays`. A plan makes batches and runs its steps where its arrays lie.
"""
