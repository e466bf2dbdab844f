"""What users see: RMSProp, AdaGrad and their functional forms, with groups, structure and the choice of a plan.

`profiling`, `demo` and `cli` may import it, and so does the package itself, which exports it to users.
"""
