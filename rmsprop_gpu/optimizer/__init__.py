"""What users hold: RMSProp, AdaGrad and their functional forms, with groups, structure and the choice of a plan.

`profiling`, `demo` and `cli` may import it; so does the package itself, which hands it to users.
"""
