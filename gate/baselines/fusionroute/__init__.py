"""FusionRoute (arXiv 2601.05106): a router model that picks an expert a token and adds its own log-probabilities.

log p = log p_router + log p_chosen, renormalised; chosen = argmax W h, where h enters the router's lm_head.
`python -m gate.baselines.fusionroute` trains the router and W; any deployment serves them (policy `fusionroute`).
"""
