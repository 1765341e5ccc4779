"""The learned gate of polylogit: contract, checkpoint, model, training and evaluation.

Never imports `server`; importing this package imports nothing else.
"""
