"""What users hold: RMSProp, AdaGrad and their functional forms, with groups, structure and the choice of a plan.

It may import `state`, `conventions`, `steps` and what these stand on.
"""
